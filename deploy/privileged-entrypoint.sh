#!/bin/sh
# Under cgroup v2 only a cgroup without processes of its own may hand its controllers to others. So what runs in the
# root of this container's cgroup namespace moves to a leaf, beside which the containers' cgroups then lie.
# Done only where that root is ours: a namespace of its own (/proc says `/`), which a privileged container may write to.
set -eu
tree=/sys/fs/cgroup
if [ -w "$tree/cgroup.procs" ] && [ "$(cat /proc/self/cgroup)" = 0::/ ]; then
    mkdir -p "$tree/service"
    for process in $(cat "$tree/cgroup.procs"); do
        echo "$process" >"$tree/service/cgroup.procs" || true # it may have ended meanwhile
    done
fi
exec "$@"
