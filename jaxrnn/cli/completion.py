"""What a shell offers on TAB: commands, flags, the values of those that have a choice; else the shell's file names.

A shell's script asks the program itself, which reads its own flags: what is offered is what there is.
"""

from collections.abc import Iterator

from jaxrnn.cli import common
from jaxrnn.cli.commands import COMMANDS, load, summary
from jaxrnn.errors import UserError

CALLBACK = '--complete'
"""Asks for what may stand in place of the last of the words that follow it. Not for people."""

Offer = tuple[str, str]
"""A word, and what it means."""

_BASH = r"""_jaxrnn() {
    local line before=${COMP_WORDS[COMP_CWORD-1]} current=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    while IFS=$'\t' read -r line _; do
        [[ $before == = || $current == = ]] && line=${line#*=}  # bash parts words at =
        [[ $line ]] && COMPREPLY+=("$line")
    done < <("${1/#\~/$HOME}" --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
} 2>/dev/null
complete -o default -F _jaxrnn jaxrnn"""

_ZSH = r"""_jaxrnn() {
    local line offer
    local -a whole open
    for line in "${(@f)$(${~words[1]} --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        offer=${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}
        [[ $line == *=$'\t'* ]] && open+=("${offer%:}")
        [[ $line == *[^=]$'\t'* ]] && whole+=("${offer%:}")
    done
    if (( $#whole + $#open == 0 )); then
        compset -P '*='
        _files
        return
    fi
    _describe jaxrnn open -S '' -- whole
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _jaxrnn jaxrnn"""

_FISH = r"""function __jaxrnn_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($words[1] --complete $words[2..-1] "$current" 2>/dev/null)
    if test -n "$found"
        printf '%s\n' $found
    else
        set -l prefix (string match -r -- '^--[^=]*=' "$current")
        for path in (__fish_complete_path (string replace -r -- '^--[^=]*=' '' "$current"))
            echo "$prefix$path"
        end
    end
end
complete -c jaxrnn -f -a '(__jaxrnn_complete)'"""

SCRIPTS = {'bash': _BASH, 'zsh': _ZSH, 'fish': _FISH}

OPTIONS = {
    '--help': 'List the commands.',
    '--version': 'Print the version.',
    **{f'--completion={shell}': f'Print what {shell} is to evaluate.' for shell in SCRIPTS},
}
"""Of the program itself -> what they mean."""


def script(shell: str) -> str:
    """What a shell is to evaluate. Raises UserError for another shell."""
    if shell not in SCRIPTS:
        raise UserError(f'--completion: {shell or "nothing"} found, one of {", ".join(SCRIPTS)} expected')
    return SCRIPTS[shell]


def lines(words: list[str]) -> list[str]:
    """What `offers` gives, as the scripts read it. Never an error: on TAB there is no place for one."""
    try:
        return [f'{word}\t{meaning}' for word, meaning in offers(words)]
    except Exception:
        return []


def offers(words: list[str]) -> list[Offer]:
    """What may stand in place of the last of the words that follow `jaxrnn`.

    Nothing, where that is the name of a file, or isn't known.
    """
    *before, current = _joined(words) or ['']
    commands = [(name, summary(name)) for name in COMMANDS]
    if not before:
        found = [*commands, *OPTIONS.items()]
    elif before == ['help']:
        found = commands
    elif before[0] in COMMANDS:
        load(before[0])
        found = _after(before[-1], current)
    else:
        found = []
    return [offer for offer in found if offer[0].startswith(current)]


def _joined(words: list[str]) -> list[str]:
    """The words as they were typed: bash parts them at every =."""
    whole: list[str] = []
    for before, word in zip(['', *words], words, strict=False):
        if whole and '=' in (before, word):
            whole[-1] += word
        else:
            whole.append(word)
    return whole


def _after(before: str, current: str) -> list[Offer]:
    """A command's flags, or the values of the flag that waits for one: `--network=`, or `--network` and a space."""
    name, equals, _ = current.partition('=')
    values, waiting = _values(), name if equals else before
    if waiting in values:
        return [(f'{name}={value}' if equals else value, '') for value in values[waiting]]
    return [*_flags()]


def _values() -> dict[str, list[str]]:
    """A flag that needs a value -> those it may have; none where it may have any."""
    needing = [flag for flag in common.defined() if not flag.boolean]
    choices = {f'--{flag.name}': getattr(flag.parser, 'enum_values', []) for flag in needing}
    return {**choices, '--flagfile': []}


def _flags() -> Iterator[Offer]:
    for flag in common.defined():
        yield f'--{flag.name}' if flag.boolean else f'--{flag.name}=', common.meaning(flag)
        if flag.boolean:
            yield f'--no{flag.name}', f'Not: {common.meaning(flag)}'
    yield '--flagfile=', common.FLAGFILE
    yield '--help', 'Explain the flags.'
