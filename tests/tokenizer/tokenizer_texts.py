"""Random texts that tokenizers disagree on when anything about them is off by one rule."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence

CODE = [
    "def f(x):\n    return [i**2 for i in range(x) if i % 2 == 0]\n",
    "#include <vector>\nint main() {\n\tstd::vector<int> v{1, 2, 3};\n\treturn v.size();\n}\n",
    "SELECT name, count(*) FROM users WHERE age >= 21 GROUP BY 1;\r\n",
    'fn main() { println!("{}", 0xFF_u8 as f32 / 3.14e-10); }',
    '<div class="a b">&nbsp;</div>\n<!-- comment -->\n<script>let a = `x${y}`;</script>',
    '{"key": [1, 2.5, -3e+7, null, true], "nested": {"a\\n": "\\u00e9"}}',
    "if (a && b || !c) { d += e->f[g]; } // TODO: fix\n\n\n\n",
    "```python\nprint('hello')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "\\begin{equation} \\sum_{i=0}^{\\infty} \\frac{1}{i!} = e \\end{equation}",
    "x\t=\t1;\t\t\t// tab\n\t\tif\t(y)\n",
]

SCRIPTS = [
    "The quick brown fox didn't jump; I'd've thought they'll, WE'RE, it'S, o'clock 'twas.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Zażółć gęślą jaźń, Çağrı İstanbul'da ığüşöç.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "دع عنك لومي فإن اللوم إغراء ١٢٣٤٥",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण १२३",
    "আমি বাংলায় গান গাই ৪৫৬",
    "தமிழ் மொழி மிகவும் பழமையானது",
    "ภาษาไทยไม่มีการเว้นวรรคระหว่างคำ ๑๒๓",
    "我能吞下玻璃而不伤身体。一二三,全角：ＡＢＣ１２３!",
    "私はガラスを食べられます。それは私を傷つけません。ｶﾞｷﾞ",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요",
    "ქართული ენა და დამწერლობა",
    "Հայերեն լեզուն ունի իր այբուբենը։",
    "አማርኛ ቋንቋ ፩፪፫",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ᚠᛇᚻ᛫ᛒᛦᚦ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𒀀𒁀 𓀀𓀁 𠀀𠀁 𐍈",
    "Ⅷ ½ ² ₃ ① ㊿ Ⅻ ٪ ‰ № ™ ㎏ ﬁ ﬀ",
]

EMOJI = [
    "😀😃😄", "👨\u200d👩\u200d👧\u200d👦", "👩🏽\u200d💻", "🏳️\u200d🌈", "🇩🇪🇯🇵🇺", "❤️\u200d🔥", "☺︎☺️", "1️⃣#️⃣",
    "🧑🏿\u200d🤝\u200d🧑🏻", "🫠🪿🫨", "⌚⏰™️", "\u200d", "\ufe0f",
]  # fmt: skip

WHITE_SPACE = [
    " ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\n\n", " \n", "\n ", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003",
    "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u180e", "\u200b", "\ufeff", "\x1c", "\x1d", "\x1e", "\x1f",
]  # fmt: skip

COMBINING = [
    "e\u0301", "\u00e9", "a\u0308\u0323", "\u1e63\u0307", "\u212b", "\u2126", "\uac00\u11a8", "\u0344", "\u0958",
    "\u2adc", "n\u0303o", "\u0301",
]  # fmt: skip

MARKS = [
    "▁", "▁▁", "▁▁▁▁▁", " ▁", "▁ ", "<0x0A>", "<0xE2>", "Ġ", "ĠĠ", "Ċ", "âĢĻ", "\ufffd", "\u0000", "\x01\x7f",
]  # fmt: skip


def texts(count: int, special: Sequence[str], seed: int, assigned_only: bool = False) -> Iterator[str]:
    """``count`` random texts from code, scripts, emoji, white space, control characters, numbers and any characters
    of Unicode, strung together. ``special``: tokens that some of them contain, whole or cut. ``assigned_only``: no
    characters that Unicode has not assigned yet; references built on another version of its tables class those
    differently."""
    source = random.Random(seed)
    ascii_text = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ'0123456789_-+=!?.,;:()[]{}<>/\\|\"@#$%^&*~`"
    sources: list[Callable[[random.Random], str]] = [
        lambda r: r.choice(CODE),
        lambda r: _cut(r, r.choice(CODE)),
        lambda r: r.choice(SCRIPTS),
        lambda r: _cut(r, r.choice(SCRIPTS)),
        lambda r: _cut(r, r.choice(SCRIPTS)),
        lambda r: r.choice(EMOJI),
        lambda r: r.choice(WHITE_SPACE) * r.choice([1, 1, 1, 2, 3, 5, 8, 17, 40, 70]),
        lambda r: "".join(r.choices(WHITE_SPACE, k=r.randint(1, 6))),
        lambda r: r.choice(COMBINING),
        lambda r: r.choice(MARKS),
        lambda r: str(r.randint(0, 10 ** r.randint(1, 15))),
        lambda r: f"{r.uniform(-1e6, 1e6):,.3f}",
        lambda r: "".join(r.choices(ascii_text, k=r.randint(1, 24))),
        lambda r: r.choice("aA=-_*#. \n\té日") * r.randint(1, 90),
        lambda r: "".join(chr(r.randrange(0x20)) for _ in range(r.randint(1, 4))),
        lambda r: "".join(_character(r, assigned_only) for _ in range(r.randint(1, 8))),
        lambda r: r.choice(special) if special else "",
        lambda r: _cut(r, r.choice(special)) if special else "",
    ]
    for _ in range(count):
        yield "".join(source.choice(sources)(source) for _ in range(source.choice([1, 2, 3, 4, 6, 9])))


def _cut(source: random.Random, text: str) -> str:
    start = source.randrange(len(text))
    return text[start : start + source.randint(1, 30)]


def _character(source: random.Random, assigned_only: bool) -> str:
    ranges = [(0x20, 0x7F), (0x80, 0x250), (0x250, 0x2000), (0x2000, 0x3100), (0x3100, 0xD800), (0xE000, 0x10000)]
    ranges += [(0x10000, 0x20000), (0x1F300, 0x1FA00), (0x20000, 0x110000)]
    while True:
        character = chr(source.randrange(*source.choice(ranges)))
        if not assigned_only or unicodedata.category(character) != "Cn":
            return character
