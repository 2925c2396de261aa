"""The two themes: a dark and a light one, each with one accent; green, yellow and red are kept for state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textual.theme import Theme

DARK = Theme(
    name="infsvc-dark",
    primary="#5aa9e6",
    secondary="#5aa9e6",
    accent="#5aa9e6",
    success="#5fc98b",
    warning="#e3b341",
    error="#f0706a",
    foreground="#d5dbe1",
    background="#0e1318",
    surface="#0e1318",
    panel="#1a222b",
    dark=True,
    variables={
        "muted": "#7d8b99",
        "border": "#33404d",
        "border-blurred": "#33404d",
        "block-cursor-background": "#24496b",
        "block-cursor-foreground": "#f2f6fa",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#1d2c3a",
        "block-cursor-blurred-foreground": "#d5dbe1",
        "input-cursor-background": "#5aa9e6",
    },
)

LIGHT = Theme(
    name="infsvc-light",
    primary="#0f62ab",
    secondary="#0f62ab",
    accent="#0f62ab",
    success="#1b7f45",
    warning="#8a5c00",
    error="#c02b2b",
    foreground="#1f2730",
    background="#fafbfc",
    surface="#fafbfc",
    panel="#e9edf1",
    dark=False,
    variables={
        "muted": "#63707d",
        "border": "#c3ccd5",
        "border-blurred": "#c3ccd5",
        "block-cursor-background": "#cfe2f5",
        "block-cursor-foreground": "#10202f",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#e1e9f1",
        "block-cursor-blurred-foreground": "#1f2730",
        "input-cursor-background": "#0f62ab",
    },
)


@dataclass(frozen=True)
class Palette:
    """The theme's colours for Rich text, which cannot name theme variables. Fields are named as the variables are."""

    foreground: str
    muted: str
    accent: str
    success: str
    warning: str
    error: str

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Palette:
        return cls(**{name: variables[name] for name in cls.__dataclass_fields__})

    def colour(self, tone: str) -> str:
        """The colour of a tone such as `success`."""
        return str(getattr(self, tone))
