"""Names of parameters in the published checkpoints (cecret3350/DEA-Net), so that they load as they are."""

from __future__ import annotations

import re

_RULES = (
    (r"^down1\.0\.", "stem."),
    (r"^down([23])\.0\.", r"down\1."),
    (r"^fe_level_([23])\.", r"enter\1."),
    (r"^up1\.0\.", "up2."),
    (r"^up2\.0\.", "up1."),
    (r"^up3\.0\.", "head."),
    (r"^mix1\.", "fusion3."),
    (r"^mix2\.", "fusion2."),
    (r"\.conv1_1\.conv\.", ".central."),
    (r"\.conv1_2\.conv\.", ".horizontal."),
    (r"\.conv1_3\.conv\.", ".vertical."),
    (r"\.conv1_4\.conv\.", ".angular."),
    (r"\.conv1_5\.", ".vanilla."),
    (r"\.sa\.sa\.", ".attention.spatial."),
    (r"\.ca\.ca\.0\.", ".attention.squeeze."),
    (r"\.ca\.ca\.2\.", ".attention.excite."),
    (r"\.pa\.pa2\.", ".attention.pixel."),
)
_BLOCK = re.compile(r"^(down|up)?_?level(\d)_block(\d+)\.")
_SIDES = {"down": "encoder", "up": "decoder"}


def own_name(key: str) -> str:
    """Return the name here of a parameter of the published code."""
    if match := _BLOCK.match(key):
        side, level, number = match.groups()
        place = f"{_SIDES[side]}{level}" if side else "middle"
        key = f"{place}.{int(number) - 1}.{key[match.end() :]}"
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
    return key
