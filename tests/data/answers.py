"""What models answer, and what would be lost on the way to the screen: sixty answers."""

from __future__ import annotations

_NESTED = """1. First
   - with **bold** and `code<T>`
     - deeper still

       a paragraph in it
   - more
2. Second
   ```cpp
   std::vector<int> v{1, 2, 3};

   for (auto& x : v) std::cout << x << "\\n";
   ```
   after the code
10. Tenth
"""
_TABLE = """| Name | Type | Note |
|:-----|:----:|-----:|
| a | `List<String>` | **strong** and *weak* |
| bb | `Map<K, V>` | [link](http://a.example/x) |
| ccc | int | a longer cell that has to be broken somewhere in a narrow pane |
"""
_PAGE = """<!DOCTYPE html>
<html>
  <body class="main">
    <h1>Title &amp; more</h1>
    <script>if (a < b && c > d) { alert("x"); }</script>
  </body>
</html>
"""
_FENCED = """Here:

```python title="example.py"
def f(x: list[int]) -> dict[str, int]:
    \"\"\"Doc

    string.\"\"\"
    return {"a": x[0]}  # <b>not bold</b>
```

~~~
```
a fence in a fence
```
~~~
Done.
"""

ANSWERS: tuple[str, ...] = (
    "",
    "One word.",
    "Two\nlines.",
    "A paragraph.\n\nAnother one.",
    "<div>",
    "<div>hello</div>",
    "Use <b>bold</b> and <br/> here.",
    "Press <Enter>, then <Ctrl+C>.",
    "List<String> names = new ArrayList<>();",
    "std::vector<int> and Option<Box<dyn Error>>",
    "<!-- a comment --> and text",
    "<?php echo 1; ?>",
    "<![CDATA[ data ]]>",
    _PAGE,
    f"An example:\n\n{_PAGE}\nThat was it.",
    "<think>",
    "The tag <think> marks what a model thinks, </think> ends it.",
    "a < b && c > d || e <= f",
    "&lt;div&gt; &amp; &nbsp; &copy; &#65; &unknown;",
    "if x<y and y>z: print('<x>')",
    _TABLE,
    f"Before\n{_TABLE}after",
    "| one |\n|---|\n| 1 | 2 | 3 |",
    "| a | b |\n|---|---|\n| x |",
    _NESTED,
    "- a\n- b\n\n  more of b\n\n- c",
    "* star\n+ plus\n- minus",
    "1986. A great year.\n\n3) three\n7) seven",
    "- [ ] open\n- [x] done",
    _FENCED,
    "```\nnever closed\n\n<b>x</b>",
    "````md\n```py\nx\n```\n````",
    "text\n```js\nlet a = `${b}`;\n```\ntext",
    "`` a ` b `` and `code` and ```three```",
    "    indented code <x>\n    more",
    "> quoted <b>\n> more\n>\n> > deeper",
    "# One <x>\n## Two\n### Three\n\nSetext\n======\n\nOther\n-----",
    "5*3*2 = 30 and 2**10 and a*b*c",
    "snake_case_name and __init__ and _em_",
    "**bold** *em* ***both*** ~~gone~~ **a*b**",
    "\\*not em\\* and \\(x_1 + x_2\\) and \\[ \\frac{a}{b} \\] and \\\\",
    "$$\\sum_{i=0}^{n} x_i$$ costs $5 and $6",
    '[text](http://a.example) [titled](http://a.example "the title") <http://b.example>',
    "![a picture](http://a.example/p.png) and [ref][1]\n\n[1]: http://c.example 'Title'",
    "http://plain.example/a_b_c?x=1&y=<z>",
    "footnote[^1]\n\n[^1]: the note",
    "---\n\n***\n\n___",
    "日本語のテキストです。次の文。**重点**と`コード`。",
    "中文 List<字符串> 和 <标签>\n\n- 一\n- 二",
    "한국어 문장입니다 <태그>",
    "emoji 👩‍👩‍👧 🇩🇪 👍🏽 ✅ done",
    "שלום עולם <b>עברית</b>",
    "مرحبا بالعالم 1 2 3",
    "turned \u202egnip\u202c and \u2066isolated\u2069",
    "tab\tseparated\n\tindented\r\nwindows\r\n",
    "bell\x07 and back\x08space and nul\x00",
    "\x1b[31mred\x1b[0m and \x1b]0;title\x07text",
    "an open title \x1b]0;evil\nand the next line\n\nand the last",
    "cut \x1b[3",
    "a" * 300 + " " + "b" * 300 + "\n" + "word " * 200,
)
