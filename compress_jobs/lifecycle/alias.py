"""``alias``: names that stand for adapters, in one conditional write."""

from __future__ import annotations

from cluster.adapters.layout import is_id
from cluster.bundle.aliases import Aliases, Targets, change_aliases, read_aliases
from cluster.bundle.manifest import Manifest
from cluster.errors import ConfigError
from compress_jobs.lifecycle.aliased import fault_lines, shares
from compress_jobs.lifecycle.revision import Standing, open_current
from compress_jobs.lifecycle.source import need_known


def set_alias(out: str, name: str, targets: Targets) -> list[str]:
    """Point ``name`` at ``targets`` and no others; returns what it did, in lines.

    Raises ConfigError where the name is an adapter's or the base's, a target is not in CURRENT's revision, or the whole
    is no alias; BundleError where what is there cannot be read, PublishConflict.
    """
    standing = open_current(out)
    _check_name(name, standing.manifest)

    def changed(before: Aliases) -> Aliases:
        for target in targets:
            if target in before and target not in standing.manifest.adapters:
                raise ConfigError(f"--to {target}: it is an alias itself; name the adapters that it stands for")
        known = standing.manifest.adapters
        need_known(targets, known, "--to", f"not in the current revision of {out}; `show` lists those that are")
        return {**before, name: targets}

    before, after = change_aliases(standing.store, changed)
    if before == after:
        return [f"unchanged  {name}: {shares(targets)}"]
    was = f"{name}: {shares(before[name])}" if name in before else f"there was no {name}"
    return [f"before     {was}", f"now        {name}: {shares(targets)}", _end(standing, after)]


def remove_alias(out: str, name: str) -> list[str]:
    """Raises ConfigError where there is no such alias, BundleError, PublishConflict."""
    standing = open_current(out)

    def changed(before: Aliases) -> Aliases:
        need_known([name], before, "NAME", f"no alias of {out}; `alias` without NAME lists those that are")
        return {own: targets for own, targets in before.items() if own != name}

    before, after = change_aliases(standing.store, changed)
    now = "requests for it get a 404" if name not in standing.manifest.adapters else "the adapter of this name answers"
    return [f"before     {name}: {shares(before[name])}", f"now        {now}", _end(standing, after)]


def list_aliases(out: str, name: str | None = None) -> list[str]:
    """All of them, or the one named. Raises ConfigError where there is none of that name, BundleError."""
    standing = open_current(out)
    aliases, _ = read_aliases(standing.store)
    if name is not None:
        need_known([name], aliases, "NAME", f"no alias of {out}; --to points one at an adapter")
        aliases = {name: aliases[name]}
    lines = [f"{own}: {shares(targets)}" for own, targets in sorted(aliases.items())]
    return [*(lines or [f"no alias at {standing.store.uri}"]), *fault_lines(aliases, standing.manifest)]


def _check_name(name: str, manifest: Manifest) -> None:
    if not is_id(name):
        raise ConfigError(f"NAME {name}: expected one or two plain segments, as an adapter's id has")
    if name in (manifest.base.name, *manifest.base.accepted):
        raise ConfigError(f"NAME {name}: it is the base's name, which answers to it; choose another")
    if name in manifest.adapters:
        raise ConfigError(f"NAME {name}: it is the id of an adapter, which answers to it; choose another")


def _end(standing: Standing, aliases: Aliases) -> str:
    return f"aliases    {len(aliases)} at {standing.store.uri}; applications follow within their refresh_interval_s"
