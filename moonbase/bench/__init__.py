"""Measurements beside peers: each bench runs both sides in one process on one machine and prints one table.

Every row has shape, unit, ours, peer, peer_name, ratio (how many times better ours is) and roof_share (share of what
the hardware was measured to do in the same run); rows of kernels also what a roofline is drawn from (`rows`). A peer
that is not installed is named as absent, never skipped silently. `card` keeps a result as a page with a picture.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moonbase.errors import UserError, did_you_mean
from moonbase.files import explain_os_error, make_folder

SEED = 0
_PEERS = {"train": ("transformers",), "muon": ("torch",), "moe": ("torch",), "mla": ("torch",),
          "decode": ("transformers",), "serve": ("transformers",), "slice": (), "int4": (), "speedrun": (),
          "swarm": (), "agents": (), "evals": ()}
_TITLES = {"train": "Training", "decode": "Decoding and the time to the first token", "serve": "Serving",
           "int4": "What INT4 costs in loss", "swarm": "Wide tasks, one agent and many", "agents": "Agents",
           "evals": "Evaluation"}
_OLD_NAMES = {"optimizer": "muon"}
_WITHOUT_PRESET = ("swarm", "agents", "evals")
_BENCHES = tuple(_PEERS)


def run(name: str, preset: str | None = None, peer: str | None = None, card: Path | None = None,
        picture: Path | None = None, minutes: float | None = None, out: Path | None = None) -> dict[str, Any]:
    """Run the bench `name`; write its card (with a picture beside it) and its picture where names are given for them.

    preset: pico unless given; agents, swarms and evaluations are measured without a network. minutes and out are for
    `speedrun` alone, which may take several calls: how long this one may be, and the folder that keeps its runs.

    Returns name, title, command, machine, commit, versions, seed, method and rows, of benches of kernels also roofs and
    absent, and files: what was written. Raises UserError for names and places that will not do, before anything is
    measured.
    """
    if name in _OLD_NAMES:
        print(f"moonbase bench {name} is called moonbase bench {_OLD_NAMES[name]} now", file=sys.stderr)
        name = _OLD_NAMES[name]
    if name not in _BENCHES:
        raise UserError(f"no bench {name!r}{did_you_mean(name, _BENCHES)}. Benches: {', '.join(_BENCHES)}")
    if preset is not None and name in _WITHOUT_PRESET:
        raise UserError(f"bench {name} takes no preset: it measures no network")
    if peer is not None and peer not in _PEERS[name]:
        raise UserError(f"bench {name} knows no peer {peer!r}. Peers: {', '.join(_PEERS[name]) or 'none'}")
    if peer is not None and find_spec(peer) is None:
        raise UserError(f"peer {peer} is not installed here: pip install {peer}")
    options = {key: value for key, value in (("minutes", minutes), ("out", out)) if value is not None}
    if options and name != "speedrun":
        raise UserError(f"bench {name} takes no {' and no '.join(options)}: it is done in one call and keeps nothing")
    if minutes is not None and not minutes > 0:
        raise UserError(f"bench {name}: minutes are more than 0, not {minutes:g}")
    for path, module in ((card, "card"), (picture, "picture")):
        if path is not None:
            importlib.import_module(f"moonbase.bench.{module}").check_name(path)
            _check_place(path)
    result = _measured(name, preset or "pico", peer, **options)
    files = []
    if card is not None:
        from moonbase.bench.card import write

        files += write(result, card)
    if picture is not None:
        from moonbase.bench.picture import draw

        draw(result, picture)
        files.append(picture)
    return result | {"files": [str(path) for path in files]}


def machine_name() -> str:
    """The GPU, or the processor with its cores."""
    from moonbase.report.machine import machine_facts

    facts = machine_facts()
    return facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores"


def _check_place(path: Path) -> None:
    """Raises UserError where nothing can be written under that name: now, and not after minutes of measuring."""
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path}: a folder with this name is in the way. Choose another name.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        error.filename = str(path.parent)
        raise explain_os_error(error, path) from None


def _measured(name: str, preset: str, peer: str | None, **options: Any) -> dict[str, Any]:
    import torch

    from moonbase.report.machine import git_commit, package_versions

    torch.manual_seed(SEED)
    machine, commit = machine_name(), git_commit()
    module = importlib.import_module(f"moonbase.bench.{name}")
    found = module.measure(preset, peer, **options)
    if not isinstance(found, dict):
        found = {"title": _TITLES[name], "rows": found, "method": module.METHOD}
    seeds = getattr(module, "SEEDS", (SEED,))
    title = name if name in _WITHOUT_PRESET else f"{name} {preset}"
    versions = package_versions()
    if peer is not None and peer not in versions:
        versions[peer] = metadata.version(peer)
    command = f"moonbase bench {name}" + ("" if name in _WITHOUT_PRESET else f" --preset {preset}")
    return {"name": title, "command": command + (f" --peer {peer}" if peer else ""),
            "machine": machine, "commit": commit, "versions": versions,
            "seed": SEED if len(seeds) == 1 else ", ".join(map(str, seeds)), **found}
