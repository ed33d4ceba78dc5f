# SPDX-License-Identifier: Apache-2.0
# Makes every kind of orphan with the real engines. For a THROW-AWAY host only (tests/host); Host.sh() has it sourced.
# Docker 20.10 to 28, containerd 1.4 to 2, cgroup v1 and v2. Functions that take IDs take several: one crash for all.
# shellcheck shell=bash

MOBY_V1=/run/containerd/io.containerd.runtime.v1.linux/moby
MOBY_V2=/run/containerd/io.containerd.runtime.v2.task/moby
RUNC_STATE=/run/docker/runtime-runc/moby

# ---- healthy containers

img()  { docker image inspect bb:1 >/dev/null 2>&1 || tar -C / -c -h bin/busybox | docker import - bb:1 >/dev/null; }
run2() { docker run -d --name "$1" --network none "${@:2}" bb:1 /bin/busybox sleep 99999; }       # v2 shim; prints the id
run1() { run2 "$1" --runtime io.containerd.runtime.v1.linux "${@:2}" 2>/dev/null; }               # v1: Docker <= 20.10 and cgroup v1
shims() { pgrep -f "^[^ ]*containerd-shim.*[ /]$1( |\$)" || :; }          # pids of the shims that have the id in their argv
shim()  { shims "$1" | head -1; }
init()  { sed 's/.*"init_process_pid":\([0-9]*\).*/\1/' "$RUNC_STATE/$1/state.json"; }
wait_gone() { local i; for i in $(seq 150); do [ -d "/proc/$1" ] || return 0; sleep 0.1; done; echo "pid $1 is still there" >&2; return 1; }

# ---- the engines

crash() {   # crash docker [containerd]: SIGKILL to the daemon only, not restarted by systemd
    local e p pids=()
    mkdir -p /run/systemd/system/{docker,containerd}.service.d
    printf '[Service]\nRestart=no\n' | tee /run/systemd/system/{docker,containerd}.service.d/crash.conf >/dev/null
    systemctl daemon-reload
    for e in "$@"; do p=$(systemctl show -p MainPID --value "$e"); [ "$p" = 0 ] || pids+=("$p"); done
    # not "systemctl stop docker.socket": docker.service requires it and would stop its containers cleanly
    systemctl kill -s KILL --kill-who=main "$@"
    for p in "${pids[@]}"; do wait_gone "$p"; done
}
back() {    # start the engines again (reset-failed: else "start of the service was attempted too often")
    rm -f /run/systemd/system/{docker,containerd}.service.d/crash.conf; systemctl daemon-reload
    systemctl reset-failed docker containerd 2>/dev/null || :
    systemctl start containerd docker
}
live_restore() {    # once, before the first container: neighbours then live through dockerd's restarts with the same pids
    mkdir -p /etc/docker; echo '{"live-restore": true}' >/etc/docker/daemon.json
    systemctl reset-failed docker 2>/dev/null || :; systemctl restart docker
}
forget_docker() {   # a shareable IPC namespace's shm is mounted in its directory
    local i; for i in "$@"; do umount "/var/lib/docker/containers/$i/mounts/shm" 2>/dev/null || :; rm -rf "/var/lib/docker/containers/$i"; done
}
forget_bundle() { local i; for i in "$@"; do rm -rf "${MOBY_V1:?}/$i" "${MOBY_V2:?}/$i"; done; }
forget_record() { local i; for i in "$@"; do ctr -n moby containers rm "$i" 2>/dev/null || :; done; }    # works once the task is not listed
forget_all()    { rm -rf /var/lib/containerd/io.containerd.metadata.v1.bolt/*; }         # of every namespace: neighbours too

# ---- the kinds (docs: orphand(8)); IDs are full ids of running containers of Docker's

engine_orphan()  { crash docker; forget_docker "$@"; back; }                             # containerd keeps task and container
stopped_orphan() { engine_orphan "$@"; local i p; for i in "$@"; do p=$(init "$i"); kill -KILL "$p"; wait_gone "$p"; done; }
leaked_shim()    { crash docker containerd; forget_docker "$@"; forget_bundle "$@"; back; forget_record "$@"; }
childless_shim() { leaked_shim "$@"; local i p; for i in "$@"; do p=$(init "$i"); kill -KILL "$p"; wait_gone "$p"; done; }
shimless() {
    local i p pids=()
    crash docker containerd
    for i in "$@"; do pids+=("$(shim "$i")"); done
    for p in "${pids[@]}"; do kill -KILL "$p"; wait_gone "$p"; done
    forget_docker "$@"; forget_bundle "$@"; back; forget_record "$@"
}
disowned() { crash docker containerd; forget_all; back; }      # ALL of Docker's at once, bystanders too: for a fresh host only

pod() {     # pod NAME APP...: one v2 shim that serves NAME (the sandbox) and each APP, in namespace k8s.io
    ctr -n k8s.io images ls -q | grep -q bb:1 || docker save bb:1 | ctr -n k8s.io images import - >/dev/null
    local p=$1 t=sandbox c shares=
    # ctr's own default, 1024, fails where the cpu controller is not there (nspawn, cgroup v2); 1.4's ctr has none
    ! ctr run --help | grep -q -- --cpu-shares || shares="--cpu-shares 0"
    for c in "$@"; do
        # shellcheck disable=SC2086
        ctr -n k8s.io run -d $shares --runtime io.containerd.runc.v2 --annotation io.kubernetes.cri.container-type=$t \
            --annotation io.kubernetes.cri.sandbox-id="$p" docker.io/library/bb:1 "$c" /bin/busybox sleep 99999
        t=container
    done
}

# ---- what is there

left() {    # what remains of a container of Docker's, in one line; all zero and "404" when nothing does
    local id=$1 dirs n
    dirs=$(find /sys/fs/cgroup -maxdepth 5 -type d -name "*$id*" 2>/dev/null || :)
    n=$(for d in $dirs; do cat "$d/cgroup.procs" 2>/dev/null || :; done | sort -u | wc -l)        # v1: one of many hierarchies each
    echo "shims=$(shims "$id" | wc -l) processes=$n cgroups=$(printf %s "$dirs" | grep -c . || :)" \
         "bundles=$(find "$MOBY_V1/$id" "$MOBY_V2/$id" -maxdepth 0 2>/dev/null | wc -l)" \
         "runc-state=$(find "$RUNC_STATE/$id" -maxdepth 0 2>/dev/null | wc -l)" \
         "tasks=$(ctr -n moby tasks ls -q 2>/dev/null | grep -c "$id" || :) containers=$(ctr -n moby containers ls -q 2>/dev/null | grep -c "$id" || :)" \
         "docker=$(docker inspect -f '{{.State.Status}}' "$id" 2>/dev/null | grep . || echo 404)"
}

# sweep KEEP…: after a test, end every container but those with these full ids (orphans of any kind, pods too)
sweep() {
    local ids id p g root ns
    keep() { case " $* " in *" $id "*) return 0;; *) return 1;; esac; }
    rm -f /run/systemd/system/{docker,containerd}.service.d/crash.conf
    systemctl is-active -q containerd docker || back
    for id in $(docker ps -aq --no-trunc); do keep "$@" || docker rm -f "$id" >/dev/null 2>&1 || :; done
    ids=$( { pgrep -af '^[^ ]*containerd-shim' | grep -oE '[0-9a-f]{64}' || :
             ls "$RUNC_STATE" 2>/dev/null || :
             ctr -n moby containers ls -q 2>/dev/null || :; } | sort -u)
    for id in $ids; do
        keep "$@" && continue
        ctr -n moby tasks rm -f "$id" >/dev/null 2>&1 || :
        for g in $(find /sys/fs/cgroup -maxdepth 5 -type d -name "*$id*" 2>/dev/null); do
            while read -r p; do kill -KILL "$p" 2>/dev/null || :; done <"$g/cgroup.procs" 2>/dev/null || :
        done
        for p in $(shims "$id"); do kill -KILL "$p" 2>/dev/null || :; done
        for p in $(shims "$id"); do wait_gone "$p"; done
        [ ! -d "$RUNC_STATE/$id" ] || runc --root "$RUNC_STATE" delete --force "$id" >/dev/null 2>&1 || :
        ctr -n moby containers rm "$id" >/dev/null 2>&1 || :
        for root in "$MOBY_V1" "$MOBY_V2"; do umount "$root/$id/rootfs" 2>/dev/null || :; rm -rf "${root:?}/$id"; done
    done
    for ns in $(ctr namespaces ls -q 2>/dev/null | grep -vx moby); do
        for id in $(ctr -n "$ns" tasks ls -q 2>/dev/null); do ctr -n "$ns" tasks rm -f "$id" >/dev/null 2>&1 || :; done
        for id in $(ctr -n "$ns" containers ls -q 2>/dev/null); do ctr -n "$ns" containers rm "$id" >/dev/null 2>&1 || :; done
    done
}
