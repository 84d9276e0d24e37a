"""Chat templates that write today's date: they are given one date, so that a prompt is the same on every day.

transformers gives every template the function `strftime_now`, and takes none in its place: what a template is called
with is made plain data. So a template that names the function gets a macro of that name before it.
"""

from __future__ import annotations

import datetime
from typing import Any

DATE = datetime.datetime(2024, 7, 26)  # what Llama's own templates write where there is no clock
CLOCK = "strftime_now"
# What of `strftime` does not follow from the machine; anything else stays as it stands in the template.
DIRECTIVES = (*"aAbBcdDeFGHIjmMpSTuUVwWxXyY", "-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y")


def uses_date(template: Any) -> bool:
    """Whether a tokenizer's chat template (text, several by name, or None) asks for the date."""
    return CLOCK in str(template)


def with_fixed_date(template: str) -> str:
    """A chat template for which it is always `DATE`, 0 o'clock."""
    written = "".join(f"|replace('%{name}', '{_written(name)}')" for name in DIRECTIVES)
    # The line end behind it is taken off by transformers' `trim_blocks`, so that the template's own stays.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{written} }}}}{{%- endmacro %}}\n{template}"


def _written(directive: str) -> str:
    if directive.startswith("-"):  # a number without zeros before it; not known everywhere
        return str(int(DATE.strftime(f"%{directive[1]}")))
    return DATE.strftime(f"%{directive}")
