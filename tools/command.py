"""What the tools share: their beginning and their end, as those of the commands of tas.py."""

import contextlib
import html
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas

def printable(text):
    """The text, with escapes for what a terminal would act upon."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))

def markdown(text):
    """The text as it is, where Markdown or HTML would read more into it."""
    text = html.escape(printable(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)

def run(parser, function, argv):
    """Parse argv and call function(args). Returns the exit status: what the function returns or 0;
    2 after one line on stderr for what the user can mend; 130 when stopped."""
    with contextlib.suppress(AttributeError):  # a notebook's streams
        for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters of a name
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        args = parser.parse_args(argv)
        for name, value in vars(args).items():  # of an unset variable
            given = value if isinstance(value, list) else [value]
            tas.require("" not in given, f"{name.replace('_', '-')}: an empty value")
        return function(args) or 0
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        tas.drop_output()
        return 141
    except (tas.TASError, OSError) as error:
        tas.drop_output()
        reason = str(error).rsplit("TASError: ", 1)[-1]  # where a worker process raised it
        return tas.complain(printable(reason.strip()))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
