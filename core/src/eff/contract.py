"""Checks of a plugin against the contract, made when it is loaded. One line per fault, with its mend."""

from __future__ import annotations

import inspect
from typing import Any

from eff.errors import PluginError, Problems, did_you_mean
from eff.hookspecs import CONTRACT, HOOK_NAMES, PROJECT, Hooks
from eff.method import Card, Extension, Method

_MARK = f"{PROJECT}_impl"  # where pluggy's HookimplMarker leaves its options


def check_method(name: str, target: Any) -> type[Method[Any]]:
    """Return `target` if it is a method that fits the contract.

    Raises:
        PluginError: one fault. Problems: several.
    """
    if not (inspect.isclass(target) and issubclass(target, Method)):
        raise PluginError(f"{name}: the entry point names {target!r}; it must name a subclass of eff.method.Method")
    faults = _contract_faults(name, target)
    if not isinstance(getattr(target, "card", None), Card):
        faults.append(f"{name}: has no card; set card = Card(...) on {target.__name__}")
    try:
        config = target.config_type()
        config()
    except TypeError as error:
        faults.append(f"{name}: {error} with a pydantic model (subclass of eff.method.MethodConfig)")
    except ValueError as error:
        faults.append(f"{name}: the configuration has no valid defaults: {str(error).splitlines()[0]}")
    faults += hook_faults(name, target, ())
    _raise(faults)
    return target


def check_extension(name: str, target: Any) -> type[Extension]:
    """Return `target` if it is an extension that fits the contract.

    Raises:
        PluginError: one fault. Problems: several.
    """
    if not (inspect.isclass(target) and issubclass(target, Extension)):
        raise PluginError(f"{name}: the entry point names {target!r}; it must name a subclass of eff.method.Extension")
    _raise(_contract_faults(name, target) + hook_faults(name, target, target.hookspecs))
    return target


def _raise(faults: list[str]) -> None:
    if len(faults) == 1:
        raise PluginError(faults[0])
    if faults:
        raise Problems([PluginError(fault) for fault in faults])


def _contract_faults(name: str, target: Any) -> list[str]:
    if target.contract == CONTRACT:
        return []
    return [f"{name}: speaks contract {target.contract}, this core speaks {CONTRACT}; update the plugin or eff-core"]


def hook_faults(name: str, target: type, own_specs: tuple[str, ...]) -> list[str]:
    """Return what is wrong with the hook implementations of a class."""
    faults: list[str] = []
    for attribute, function in inspect.getmembers(target, inspect.isfunction):
        options = getattr(function, _MARK, None)
        where = f"{name}: {target.__name__}.{attribute}"
        if options is None:
            if attribute in HOOK_NAMES:
                faults.append(f"{where} is named like a hook but not marked; put @hookimpl above it")
            continue
        hook = options.get("specname") or attribute
        if hook not in HOOK_NAMES:
            # A family's own hooks (prefix_...) are pluggy's to check, once their specification is there.
            if "_" not in hook or did_you_mean(hook, HOOK_NAMES):
                faults.append(f"{where}: there is no hook '{hook}'{did_you_mean(hook, HOOK_NAMES)}")
            continue
        faults += [f"{where}: {fault}" for fault in _signature_faults(function, hook)]
        if (options.get("wrapper") or options.get("hookwrapper")) and not inspect.isgeneratorfunction(function):
            faults.append(f"{where}: is a wrapper without a yield; write 'result = yield' and return it")
        if inspect.isgeneratorfunction(function) and not (options.get("wrapper") or options.get("hookwrapper")):
            faults.append(f"{where}: has a yield but is no wrapper; mark it @hookimpl(wrapper=True)")
    return faults


def _signature_faults(function: Any, hook: str) -> list[str]:
    known = list(inspect.signature(getattr(Hooks, hook)).parameters)[1:]
    faults = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            faults.append(
                f"argument '{parameter}' is variadic or keyword-only, which pluggy does not pass; name it plainly"
            )
        elif parameter.name not in known:
            hint = did_you_mean(parameter.name, known)
            faults.append(f"argument '{parameter.name}' is not one of the hook's ({', '.join(known)}){hint}")
        elif parameter.default is not parameter.empty:
            faults.append(f"argument '{parameter.name}' has a default, so pluggy does not pass it; remove the default")
    return faults
