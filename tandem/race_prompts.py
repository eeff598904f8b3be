"""The prompts that `tandem race` plays when no file is given: talk, arithmetic, code, an edit, a list."""

PROMPTS = (
    "Explain in a few sentences why the sky is blue during the day and red in the evening.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Explain each step.",
    "Write a Python function that returns the n-th Fibonacci number, with a short docstring.",
    "Correct the spelling and repeat the whole text: The libary was allmost empty, exept for two studdents who "
    "were waitting for there freinds. The libary closes at nine.",
    "List ten fruits, one on each line, each with its usual colour in brackets.",
    "Rename the variable `x` to `total` and repeat the code:\n\n"
    "def mean(values):\n    x = 0\n    for value in values:\n        x = x + value\n    return x / len(values)\n",
    "Write a polite e-mail that asks a colleague to move a meeting from Monday to Wednesday.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
)
