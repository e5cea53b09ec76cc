"""Runs launch lines, each as if in a process of its own: a fork of this one, so that what all need is imported once.

`python launching.py JOBS LOGS`: JOBS is a JSON list of lists of words, of which the first names the program. Lines run in
the working folder one after another, up to the first that fails; what line N printed is in LOGS/N.txt.
"""

import glob
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
from accelerate.commands import launch

from priors_peft.cli import COMMANDS


def run_python(words: list[str]) -> None:
    """What `python` does with these words."""
    module = words[0] == "-m"
    script, *rest = words[1:] if module else words
    sys.argv = [script, *rest]
    if module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")


def run_launched(args) -> None:
    """What `accelerate launch` starts for one process."""
    command, environment = launch.prepare_simple_launcher_cmd_env(args)
    os.environ.update(environment)
    run_python(command[1:])


def run(words: list[str]) -> None:
    program, *rest = words
    if program == "python":
        run_python(rest)
    elif program == "priors-peft":
        run_python(["-m", "priors_peft", *rest])
    else:
        assert [program, *rest[:1]] == ["accelerate", "launch"], words
        launch.simple_launcher = run_launched
        launch.launch_command(launch.launch_command_parser().parse_args(rest[1:]))


def in_a_fork(words: list[str], log: Path) -> int:
    """The exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        run(words)
        status = 0
    except SystemExit as ended:
        print(ended.code if isinstance(ended.code, str) else "", flush=True)
        status = 0 if ended.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in COMMANDS:
        importlib.import_module(f"priors_peft.commands.{name}")
    for number, words in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        there = [sorted(glob.glob(word)) or [word] if "*" in word else [word] for word in words]
        if in_a_fork(sum(there, []), Path(sys.argv[2]) / f"{number}.txt"):
            sys.exit(f"line {number}")
