"""Text from files, such as labels and names, made harmless where it is shown: in Markdown, on a terminal, in CSV."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001 - spreadsheets take the wide ones, too


def markdown(text: object) -> str:
    r"""Return a text that is shown as it is in Markdown: on one line, no heading, HTML, link or column of a table.

    Example:
        >>> markdown("<b>B</b>\n# [cell](javascript:alert)|x")
        '&lt;b&gt;B&lt;/b&gt; # \\[cell\\](javascript:alert)\\|x'
    """
    line = " ".join(_CONTROL.sub(" ", str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Underscores inside a word are text.
    line = re.sub(r"([\\`|\[\]*~]|(?<![^\W_])_|_(?![^\W_])|(?<=https)://|(?<=http)://|(?<=ftp)://|(?<=www)\.|(?<=\w)@(?=\w))", r"\\\1", line)
    # At the beginning of a line these make a heading, a list, a rule or a block of code.
    line = re.sub(r"^(\d*)([#*+.)-])(?=[#\s]|$)", r"\1\\\2", line)
    return re.sub(r"^([=~*-])(?=\1)", r"\\\1", line)


def code(text: object) -> str:
    """Return a text as a span of code in Markdown, with longer fences where it holds backticks.

    Example:
        >>> code("cell_type"), code("a`b|c")
        ('`cell_type`', '`` a`b\\\\|c ``')
    """
    line = " ".join(_CONTROL.sub(" ", str(text)).split()).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if fence == "`" else f"{fence} {line} {fence}"


def fenced(text: str, language: str) -> str:
    """Return lines as a block of code in Markdown, with a fence that the text cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def terminal(text: str) -> str:
    r"""Return a text without control characters, which could move the cursor or change what stands on a terminal.

    Example:
        >>> terminal("a\x1b[2Kb\tc\n")
        'a\\x1b[2Kb\tc\n'
    """
    return _CONTROL.sub(lambda match: repr(match.group())[1:-1], text)


def csv_cell(value: object) -> object:
    """Return a value for a cell of a CSV file: text that a spreadsheet would run as a formula gets an apostrophe in front.

    Example:
        >>> csv_cell("=HYPERLINK()"), csv_cell("-1.5"), csv_cell("CD4+ T"), csv_cell(-1)
        ("'=HYPERLINK()", '-1.5', 'CD4+ T', -1)
    """
    if not isinstance(value, str) or not value.lstrip().startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
