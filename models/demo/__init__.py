"""nybble-demo: a toy mixture of experts trained on tasks with known answers, with its data, script and weights."""
