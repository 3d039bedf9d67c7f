#!/bin/sh
# Make every video of a batch file, and go on after anything that stops it:
#
#   sh scripts/batch.sh prompts.txt [OPTIONS OF wan22 batch …]
#
# Run it again, or on another host over the same folder at the same time: nothing is made twice. WAN22 names the command
# (default: wan22, or python -m wan22 where that is not installed); TRIES how often it is begun again (default: 3) after it
# failed while running. Items that are wrong, or failed twice, end it with exit code 1 and a table.
set -eu

if [ $# -eq 0 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

wan22() {
    if [ -n "${WAN22:-}" ]; then
        # shellcheck disable=SC2086  # a command may be several words
        $WAN22 "$@"
    elif command -v wan22 >/dev/null 2>&1; then
        command wan22 "$@"
    else
        python -m wan22 "$@"
    fi
}

tries=${TRIES:-3}
while :; do
    code=0
    wan22 batch "$@" || code=$?
    tries=$((tries - 1))
    # Only a death without a word is worth another try: 1 has said what is wrong, 2 and 3 would say the same again, and
    # 130 and 143 are somebody's wish.
    case $code in
    0 | 1 | 2 | 3 | 130 | 143) exit "$code" ;;
    esac
    [ "$tries" -gt 0 ] || exit "$code"
    echo "exit code $code; once more" >&2
done
