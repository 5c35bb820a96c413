"""What every package uses: errors and exit codes, files, processes, ranks, signals, the heartbeat."""
