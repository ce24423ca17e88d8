"""Exit codes of the command line: 0 when the answer is right, and these."""

#: Input or output failed, bad input, a solve that failed, Ctrl-C, a reader that went away.
UNWRITTEN, BAD_INPUT, FAILED, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141
