# SPDX-License-Identifier: Apache-2.0
# bash completion of orphand

_orphand() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command='' word
    local commands='daemon scan explain reap hold resume status history check-config'
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case " $commands " in *" $word "*) command=$word; break;; esac
    done
    case $previous in
        --config) mapfile -t COMPREPLY < <(compgen -f -- "$current"); return;;
        --for|--since|--lines|-n) return;;
    esac
    case $command in
        '') mapfile -t COMPREPLY < <(compgen -W "$commands --config --help --version" -- "$current");;
        scan) mapfile -t COMPREPLY < <(compgen -W '--json --watch --help' -- "$current");;
        explain) _orphand_ids '--json --help';;
        reap) _orphand_ids '--json --yes --help';;
        hold) mapfile -t COMPREPLY < <(compgen -W '--for --help' -- "$current");;
        status) mapfile -t COMPREPLY < <(compgen -W '--json --help' -- "$current");;
        history) mapfile -t COMPREPLY < <(compgen -W '--json --since --lines --help' -- "$current");;
        daemon|resume) mapfile -t COMPREPLY < <(compgen -W '--help' -- "$current");;
        check-config)
            case $current in
                -*) mapfile -t COMPREPLY < <(compgen -W '--help' -- "$current");;
                *) mapfile -t COMPREPLY < <(compgen -f -- "$current");;
            esac;;
    esac
}

# ids that the daemon saw last; no engine is asked at a press of TAB
_orphand_ids() {
    local ids=''
    [[ $current == -* ]] || ids=$(grep -oE '"container_id": ?"[^"]+"' /run/orphand/status.json 2>/dev/null | cut -d'"' -f4)
    mapfile -t COMPREPLY < <(compgen -W "$1 $ids" -- "$current")
}

complete -F _orphand orphand
