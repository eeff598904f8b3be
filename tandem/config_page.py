"""docs/configuration.md, made from `shared.config.FIELDS`: `python -m tandem.config_page > docs/configuration.md`."""

from __future__ import annotations

from itertools import groupby

from shared.config import FIELDS, Field
from tandem.units import size

HEAD = """# Configuration

<!-- Made by `python -m tandem.config_page > docs/configuration.md`; edit shared/config.py or tandem/config_page.py. -->

Every setting can be given in three ways. The first one that names it wins:

1. an option of the command: `tandem serve --max-num-seqs 8`
2. an environment variable: `TANDEM_MAX_NUM_SEQS=8`
3. a key of `tandem.toml`: `max_num_seqs = 8`

`tandem.toml` is the file of `--config`, else `./tandem.toml`, else `~/.config/tandem/tandem.toml`; only the first one
found is read. `tandem config` prints what is in effect and where each value came from:

```console
$ tandem config --port 9000
port         = 9000                     # --port
max_num_seqs = 8                        # TANDEM_MAX_NUM_SEQS
model        = "org/name"               # /srv/tandem/tandem.toml:1
```

A file:

```toml
model = "org/name"
max_num_seqs = 8
kv_cache_bytes = "4GiB"      # or 4294967296
prefix_cache = false
api_keys_file = "keys"       # relative to this file
```

A misspelt key, variable or option stops start-up and is told the right name; so does a malformed value, also one that
another layer hides. Sizes take `k`, `M`, `G` and `T` (times 1024), also as `MiB`. Switches are `--ngram` and
`--no-ngram`, or `true` and `false`. Relative paths start at the current folder, in a file at the file's folder.
`tandem serve` hands the outcome to every process of the server through its environment; whoever starts the processes
without it (`honcho start`) sets variables.

Keys belong into a file or the environment: options can be seen in the list of processes.
"""


def page() -> str:
    parts = [HEAD]
    for group, fields in groupby(FIELDS.values(), lambda field: field.group):
        parts.append(f"\n## {group}\n\n| option | variable | default | |\n|---|---|---|---|\n")
        parts += [_row(field) for field in fields]
    return "".join(parts)


def _row(field: Field) -> str:
    name = field.name.replace("_", "-")
    option = f"--[no-]{name}" if field.kind is bool else f"--{name}"
    words = [word for word in field.choices if word]
    text = field.text[0].upper() + field.text[1:] + (f" ({', '.join(f'`{word}`' for word in words)})" if words else "")
    return f"| `{option}` | `{field.variable}` | {_default(field)} | {text} |\n"


def _default(field: Field) -> str:
    if field.default == "":
        return ""
    if field.name.endswith("_bytes") and isinstance(field.default, int) and field.default > 0:
        return size(field.default).replace(".0 ", " ")
    return f"`{str(field.default).lower() if field.kind is bool else field.default}`"


if __name__ == "__main__":
    print(page(), end="")
