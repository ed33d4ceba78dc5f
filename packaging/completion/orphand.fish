# SPDX-License-Identifier: Apache-2.0
# fish completion of orphand

# ids that the daemon saw last; no engine is asked at a press of TAB
function __orphand_ids
    string match -gra '"container_id": ?"([^"]+)"' </run/orphand/status.json 2>/dev/null
end

set -l commands daemon scan explain reap hold resume status history check-config
complete -c orphand -f
complete -c orphand -l help -d 'Print help'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -l version -d 'Print the version'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -l config -rF -d 'Read this file'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a daemon -d 'Watch this node and apply the policy'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a scan -d 'Look once, every container with its verdict'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a explain -d 'The evidence about one container'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a reap -d 'End one orphan by hand'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a hold -d 'Kill nothing for now'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a resume -d 'End a hold'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a status -d 'What the running daemon saw last'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a history -d 'What orphand found and did'
complete -c orphand -n "not __fish_seen_subcommand_from $commands" -a check-config -d 'Name every mistake in the configuration'
complete -c orphand -n "__fish_seen_subcommand_from scan explain reap status history" -l json -d 'Print JSON'
complete -c orphand -n "__fish_seen_subcommand_from scan" -l watch -d 'Look again every two seconds'
complete -c orphand -n "__fish_seen_subcommand_from reap" -l yes -d 'Do not ask'
complete -c orphand -n "__fish_seen_subcommand_from hold" -l for -x -d 'For how long, such as 2h'
complete -c orphand -n "__fish_seen_subcommand_from history" -l since -x -d 'From when on'
complete -c orphand -n "__fish_seen_subcommand_from history" -s n -l lines -x -d 'Only the last'
complete -c orphand -n "__fish_seen_subcommand_from explain reap" -a '(__orphand_ids)'
complete -c orphand -n "__fish_seen_subcommand_from check-config" -F
