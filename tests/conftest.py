"""What holds for all tests."""

import signal

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that: tests that interrupt
# one would wait for ever, depending on how they were started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
