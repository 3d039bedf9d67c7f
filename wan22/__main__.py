from wan22.cli import entry

entry()
