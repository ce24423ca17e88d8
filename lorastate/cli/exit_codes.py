"""Exit codes of the command line: 0 when the answer is right, 1 when input or output failed, and these."""

BAD_INPUT, FAILED, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141
