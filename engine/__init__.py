"""Everything that moves requests: configuration, scheduling, workers, front ends."""
