"""Options of {{ cookiecutter.plugin }}. Imports no torch."""

from eff.method import Field, MethodConfig


class {{ cookiecutter.class_name }}Config(MethodConfig):
    """Options of {{ cookiecutter.plugin }}."""

    bits: int = Field(4, ge=2, le=8, description="Bit width of the weights.")
