"""What nybble-nf4 would be if it came without a library it needs."""

raise ImportError("libnf4.so.1: cannot open shared object file")
