"""Remnants of HTML in a text: found, and undone. Pure functions of strings.

Two kinds: whole ones (`<br />`, `&amp;`), and those whose `&` a tokenizer ate, as AG News has them (` #39;s`, `quot;`).
"""

from __future__ import annotations

import html
import re

_TAGS = (
    "a|abbr|address|article|b|big|blockquote|body|br|button|center|cite|code|dd|del|div|dl|dt|em|font|footer|form|h[1-6]|"
    "head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|meta|nav|object|ol|option|p|param|pre|q|s|script|"
    "section|select|small|span|strike|strong|style|sub|sup|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul|video"
)
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)  # `<3` and `a < b` are none
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_WHOLE_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8}\d?);")
_BARE_NUMBER = re.compile(r"(?<![&\w;])#(\d{2,5});")
_BARE_NAME = re.compile(r"(?<![&\w;])(quot|amp|lt|gt|nbsp|apos);")
_ENDING = re.compile(r"\s#39;(?=(?:s|t|d|m|re|ve|ll)\b)", re.IGNORECASE)  # "company #39;s" was "company's"
_SPACES = re.compile(r"[ \t\u00a0]{2,}")
_PASSES = 2  # `&amp;lt;b&amp;gt;` was escaped twice


def find_markup(text: str) -> str:
    """The first remnant of a text, as it stands there; "" where there is none."""
    patterns = (_TAG, _COMMENT, _WHOLE_ENTITY, _BARE_NUMBER, _BARE_NAME)
    found = [match for match in (pattern.search(text) for pattern in patterns) if match]
    known = [match for match in found if match.re is not _WHOLE_ENTITY or html.unescape(match[0]) != match[0]]
    return min(known, key=lambda match: match.start())[0] if known else ""


def mend_markup(text: str) -> str:
    """The text with entities unescaped, tags made into a space, comments taken out; white space at the ends stripped.

    A text without remnants is given back as it is; one that is nothing but markup becomes "".
    """
    if not find_markup(text):
        return text
    text = _ENDING.sub("'", text)
    text = _BARE_NAME.sub(r"&\1;", _BARE_NUMBER.sub(r"&#\1;", text))
    for _ in range(_PASSES):
        text = html.unescape(text)
    return _SPACES.sub(" ", _TAG.sub(" ", _COMMENT.sub("", text))).strip()
