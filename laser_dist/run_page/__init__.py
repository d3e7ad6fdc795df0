"""One HTML page per run, from what the run wrote: losses, speed, where its time went, alarms, configuration."""
