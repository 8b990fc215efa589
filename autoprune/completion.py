"""Scripts by which bash, zsh and fish complete the command line: made of conf/ once, so that no Python runs at a Tab.

All that may follow a command is listed in whole words, such as strategy=amc and evaluator.short.epochs=; a Tab goes on
to the next '.' or '=' only.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from autoprune.components import CONF, names
from autoprune.core import BUDGET_WORDS
from autoprune.manual import PAGES
from autoprune.telling import JSON, QUIET

SHELLS = ("bash", "zsh", "fish")
FLAGS = (QUIET[1], JSON)
RUNS = "RUN_DIR"  # how the page of a command that takes a run's folder begins
FILES = ("weights", "ratios", "output", "task.data", "task.checkpoint")  # keys whose value is a path


def script(shell: str, commands: Iterable[str]) -> str:
    """The script for "bash", "zsh" or "fish"."""
    listed = list(commands)
    offers = {"": [*listed, "--help"], **{command: list(_offers(command)) for command in listed}}
    offers = {command: words for command, words in offers.items() if words}
    of_runs = [command for command in listed if command in PAGES and PAGES[command].takes.startswith(RUNS)]
    case = "        case {}\n            printf '%s\\n' {}" if shell == "fish" else "    {}) printf '%s\\n' {} ;;"
    given = {
        "cases": "\n".join(case.format(shlex.quote(c), " ".join(map(shlex.quote, w))) for c, w in offers.items()),
        "runs": (" " if shell == "fish" else "|").join(of_runs),
        "files": " ".join(f"{key}=" for key in FILES) if shell == "fish" else "|".join(f"{key}=*" for key in FILES),
    }
    return {"bash": SHARED + BASH, "zsh": SHARED + ZSH, "fish": FISH}[shell] % given


def _offers(command: str) -> Iterator[str]:
    """All whole words that may follow a command."""
    takes = PAGES[command].takes if command in PAGES else ""
    if "|" in takes:
        yield from takes.split("|")
    path = CONF / f"{command}.yaml"
    values: dict[str, Any] = dict(yaml.safe_load(path.read_text())) if path.exists() else {}
    for entry in values.pop("defaults", []):
        for group in entry if isinstance(entry, dict) else ():
            choices = names(group)
            yield from (f"{group}={name}" for name in choices if len(choices) > 1)
            contents = [yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) for name in choices]
            yield from dict.fromkeys(f"{group}.{key}" for content in contents for key in _keys(content))
    for key in _keys(values):
        if key == "budget=":  # a beginning, and a whole one, beside which no shell ends the word there
            yield from (f"budget={word}_{end}" for word in BUDGET_WORDS for end in ("", "50pct"))
        else:
            yield key
    if not takes.startswith(RUNS):
        yield from ("--help", *(() if "|" in takes else FLAGS))


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}="


SHARED = r"""_autoprune_words() { # COMMAND: all that may follow it
  case "$1" in
%(cases)s
  esac
}

_autoprune_offers() { # COMMAND BEGUN: what a word may go on with, up to the next '.' or '='
  local word rest step seen=' '
  _autoprune_words "$1" | while IFS= read -r word; do
    [[ "$word" == "$2"* ]] || continue
    rest="${word:${#2}}"
    step="${rest%%%%[.=]*}"
    [[ "$step" == "$rest" ]] || step="$step${rest:${#step}:1}"
    [[ -z "$step" && "$word" == *[=_] ]] && continue
    [[ "$seen" == *" $2$step "* ]] && continue
    seen="$seen$2$step "
    printf '%%s\n' "$2$step"
  done
}

_autoprune_runs() { # COMMAND BEGUN: the folders of runs
  local found
  case "$1" in
    %(runs)s)
      find outputs -mindepth 4 -maxdepth 4 \( -name outset.json -o -name result.json \) 2>/dev/null |
        sed 's,/[^/]*$,/,' | sort -u | while IFS= read -r found; do
          [[ "$found" == "$2"* ]] && printf '%%s\n' "$found"
        done ;;
  esac
}
"""

BASH = r"""
_autoprune() {
  local typed="${COMP_LINE:0:COMP_POINT}" command='' begun offer kept=''
  begun="${typed##*[[:space:]]}" # COMP_WORDS are cut at '='
  (( COMP_CWORD > 1 )) && command="${COMP_WORDS[1]}"
  [[ "$begun" == *=* && "$COMP_WORDBREAKS" == *=* ]] && kept="${begun%%"${begun##*=}"}"
  COMPREPLY=()
  while IFS= read -r offer; do
    COMPREPLY+=("${offer#"$kept"}")
  done < <(_autoprune_offers "$command" "$begun"; _autoprune_runs "$command" "$begun")
  case "$begun" in %(files)s) compopt -o default 2>/dev/null ;; esac
  case "$command" in %(runs)s) [[ "$begun" == *=* ]] || compopt -o default 2>/dev/null ;; esac
  [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *[=._/] ]] && compopt -o nospace 2>/dev/null
  return 0
}

complete -F _autoprune autoprune
"""

ZSH = r"""
_autoprune() {
  local begun="$PREFIX" command='' offer
  local -a open closed
  (( CURRENT > 2 )) && command="${words[2]}"
  for offer in ${(f)"$(_autoprune_offers "$command" "$begun"; _autoprune_runs "$command" "$begun")"}; do
    case "$offer" in *[=._/]) open+=("$offer") ;; *) closed+=("$offer") ;; esac
  done
  (( ${#open} )) && compadd -S '' -a open
  (( ${#closed} )) && compadd -a closed
  case "$begun" in %(files)s) compset -P '*='; _files ;; esac
  case "$command" in %(runs)s) [[ "$begun" == *=* ]] || (( ${#open} )) || _files -/ ;; esac
}

(( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
compdef _autoprune autoprune
"""

FISH = r"""function __autoprune_words # COMMAND: all that may follow it
    switch "$argv[1]"
%(cases)s
    end
end

function __autoprune_offers # what a word may go on with, up to the next '.' or '='
    set -l before (commandline -opc)
    set -l begun (commandline -ct)
    set -l command ''
    test (count $before) -gt 1; and set command $before[2]
    set -l length (string length -- "$begun")
    for word in (__autoprune_words $command)
        test (string sub -l $length -- "$word") = "$begun"; or continue
        set -l rest (string sub -s (math $length + 1) -- "$word")
        set -l step (string match -r -- '^[^.=]*[.=]?' "$rest")
        test -z "$step"; and string match -qr -- '[=_]$' "$word"; and continue
        echo "$begun$step"
    end | sort -u
    if contains -- "$command" %(runs)s
        find outputs -mindepth 4 -maxdepth 4 \( -name outset.json -o -name result.json \) 2>/dev/null |
            string replace -r '[^/]*$' '' | sort -u
        __fish_complete_directories "$begun" ''
    end
    for key in %(files)s
        if string match -q -- "$key*" "$begun"
            set -l path (string replace -- "$key" '' "$begun")
            for found in $path*
                test -d "$found"; and echo "$key$found/"; or echo "$key$found"
            end
        end
    end
end

complete -c autoprune -f -a '(__autoprune_offers)'
"""
