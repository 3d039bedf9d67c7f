"""The `wan22` command. Until it can answer to Ctrl-C, which takes imports, that ends it without a word."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # which would tell where the imports were
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from wan22.cli import entry

if __name__ == "__main__":
    entry()
