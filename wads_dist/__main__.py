"""``python -m wads_dist COMMAND ...``: the console command, where it is not installed."""

from wads_dist.launch.wads import program

if __name__ == "__main__":
    program()
