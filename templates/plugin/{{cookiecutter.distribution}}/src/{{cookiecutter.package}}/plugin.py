"""Declares {{ cookiecutter.plugin }} to eff. Imports no torch; each hook imports what it needs."""

from eff.method import Card, Check, Claim, Method, hookimpl

from {{ cookiecutter.package }}.config import {{ cookiecutter.class_name }}Config


class {{ cookiecutter.class_name }}(Method[{{ cookiecutter.class_name }}Config]):
    """{{ cookiecutter.summary }}."""

    card = Card(
        title="{{ cookiecutter.title }}",
        authors=("{{ cookiecutter.author }}",),
        venue="unpublished",
        year=2026,
        paper="none",
        url="none",
    )
    claims = (
        Claim(
            id="error_falls_with_bits",
            statement="Four bits round the weights with less error than two.",
            run="{{ cookiecutter.package }}.claims:error_falls_with_bits",
            checks=(Check(left="bits_4", right="bits_2", relation="at_most"),),
            paper="put the paper's figure here",
            unit="relative error",
            minutes=0.1,
        ),
    )

    @hookimpl
    def transform(self, model, run):
        """Round the weights; a checkpoint that is being restored brings its own."""
        from {{ cookiecutter.package }}.rounding import round_weights

        return model if run.restoring else round_weights(model, self.config.bits)
