"""What a run would take: memory, time bounds and collectives, from compiled programs alone."""
