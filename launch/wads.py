"""The console command ``wads COMMAND ...``: every command of this folder, and those on shards and checkpoints."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from wads_dist import __version__
from wads_dist.common.errors import ExitCode
from wads_dist.common.processes import leave
from wads_dist.config.load import TRAIN

LAUNCH = "wads_dist.launch"
COMMANDS = {
    "train": (f"{LAUNCH}.train", "train categories as one rank; on several: deepspeed " + TRAIN),
    "status": (f"{LAUNCH}.status", "what a run is doing"),
    "evaluate": (f"{LAUNCH}.evaluate", "score a finished run again"),
    "report": (f"{LAUNCH}.report", "a run as one HTML file"),
    "predict": (f"{LAUNCH}.predict", "score images with a trained or exported model"),
    "export": (f"{LAUNCH}.export", "a trained category as ONNX and torch.export"),
    "sweep": (f"{LAUNCH}.sweep", "train a grid of settings and seeds, here or through Slurm"),
    "ablations": (f"{LAUNCH}.ablations", "train and tabulate the paper's ablations"),
    "samples": (f"{LAUNCH}.show_samples", "a picture of what training is fed"),
    "shards": ("wads_dist.shards.__main__", "build, verify and describe shards; the demo's data"),
    "checkpoint": ("wads_dist.training.checkpoint_files", "inspect or verify checkpoints"),
    "profile-step": (f"{LAUNCH}.profile_step", "where the time of a training step goes"),
    "profile-kernels": (f"{LAUNCH}.profile_kernels", "the kernels beside what others would use"),
}


def help_text() -> str:
    lines = [f"  {name:16} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: wads COMMAND ...",
            "",
            *lines,
            "",
            "`wads COMMAND --help` says more; `wads --version` says which this is.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, and returns its exit code; 2 for a command that there is not."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name == "--version":
        print(f"wads {__version__}")
        return ExitCode.OK
    if name in ("", "-h", "--help", "help"):
        print(help_text())
        return ExitCode.OK if name else ExitCode.BAD_CONFIG
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}?" if near else "wads --help lists them"
        print(f"wads: no command {name!r}; {meant}", file=sys.stderr)
        return ExitCode.BAD_CONFIG
    module, _ = COMMANDS[name]
    sys.argv = [f"wads {name}", *rest[:-1]]  # for usage lines
    return int(import_module(module).main(rest[:-1]))


def program() -> None:
    """The entry point of the installed command."""
    leave(main())


if __name__ == "__main__":
    program()
