"""The server's settings where no command line brings them: from a config's `args`, by the names of the same table."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import ray

import rerank_server
from rerank_server import OFF, ON, ModelError, Role, Settings, SettingsError, find_roles

Values = Mapping[str, Any]  # name -> value, as in rerank_server.Settings
KNOWN = tuple(field.name for field in dataclasses.fields(Settings))


def settings_of(values: Values, refused: Iterable[str] = (), **fixed: Any) -> Settings:
    """refused: names that have no meaning here. Raises SettingsError that names the wrong one."""
    for name in values:
        if name in refused or name not in KNOWN:
            known = ", ".join(sorted(set(KNOWN) - set(refused)))
            raise SettingsError(f"{name!r} is not set here; what can be set: {known}")
    given = {name: _given(name, value) for name, value in values.items()}
    arguments = argparse.Namespace(**{**dict.fromkeys(KNOWN), **given})
    return dataclasses.replace(rerank_server.read_settings(arguments, {}), **fixed)


def _given(name: str, value: Any) -> Any:
    """As a flag would bring it. YAML 1.1 reads on and off, which some settings take, as booleans."""
    if isinstance(value, bool) and not isinstance(getattr(Settings, name), bool):
        return ON if value else OFF
    return value if value is None or isinstance(value, bool) else str(value)


def actor_settings(values: Values, refused: Iterable[str] = ()) -> Settings:
    """Those of an actor, which computes with the CPUs that Ray has reserved for it. Raises SettingsError."""
    return settings_of(values, refused, threads=assigned_threads())


def find_role(name: str, settings: Settings) -> Role:
    """Raises ModelError."""
    for role in find_roles(settings):
        if role.name == name:
            return role
    raise ModelError(f"there is no file for the {name} role on this machine; it must be on every one")


def assigned_threads() -> int:
    """One for each CPU that Ray has reserved, but no more than cores: Ray counts a core's two threads as two CPUs.
    None reserved: 0, the server's own default."""
    reserved = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    return min(reserved, rerank_server.usable_cores())
