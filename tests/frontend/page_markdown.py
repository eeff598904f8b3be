"""Markdown and the elements that the chat page makes of it: for each case the text and the HTML."""

from __future__ import annotations

A = 'target="_blank" rel="noopener noreferrer nofollow"'

CASES: dict[str, tuple[str, str]] = {
    "plain": ("a < b & c", "<p>a &lt; b &amp; c</p>"),
    "HTML": ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    "emphasis": (
        "*a* **b** ***c*** _d_ ~~e~~",
        "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <del>e</del></p>",
    ),
    "no emphasis": ("snake_case_name 2 * 3 * 4 a ~ b", "<p>snake_case_name 2 * 3 * 4 a ~ b</p>"),
    "nested emphasis": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "open marks": ("**a and `b", "<p>**a and `b</p>"),
    "code": ("`a *b*` ``c`d``", "<p><code>a *b*</code> <code>c`d</code></p>"),
    "escapes": (r"\*a\*", "<p>*a*</p>"),
    "lines": ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    "headings": ("# A\n## B", "<h3>A</h3><h4>B</h4>"),
    "list": ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    "numbers": ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    "loose list": ("1. a\n\n2. b", "<ol><li><p>a</p></li><li><p>b</p></li></ol>"),
    "quote": ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
    "rule": ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    "table": (
        "|a|b|\n|-|-:|\n|1|`x`|",
        '<table><thead><tr><th class="align-left">a</th><th class="align-right">b</th></tr></thead>'
        '<tbody><tr><td class="align-left">1</td><td class="align-right"><code>x</code></td></tr></tbody></table>',
    ),
    "link": ("[a](https://e.org/x_(y))", f'<p><a href="https://e.org/x_(y)" {A}>a</a></p>'),
    "bare link": ("see https://e.org/a.", f'<p>see <a href="https://e.org/a" {A}>https://e.org/a</a>.</p>'),
    "script link": (
        "[a](javascript:alert(1)) [b](/v1/cache) [c](data:text/html,x)",
        "<p>[a](javascript:alert(1)) [b](/v1/cache) [c](data:text/html,x)</p>",
    ),
    "image": ("![a cat](https://e.org/c.png)", f'<p><a href="https://e.org/c.png" {A}>Image: a cat</a></p>'),
    "fence": ("```py\na *b*\n\n# c\n```\nd", "<pre><code>a *b*\n\n# c</code></pre><p>d</p>"),
    "open fence": ("```\na\n\nb", "<pre><code>a\n\nb</code></pre>"),
}
