#!/bin/bash
# box.sh DIRECTORY CGROUP: a systemd of its own as PID 1, over a throw-away overlay of the tree at DIRECTORY/root. Reads lines
# from stdin: each `boot` boots it (the disk stays from boot to boot); says `booting PID`, then `down`; the end of stdin is its
# end. DIRECTORY/seed is a shell script that is run once in the new root, before the first boot; DIRECTORY/venv, where it is
# there, becomes /opt/portd.
# Nothing on the host changes: mounts, pids, network and control groups are namespaces. What is not one is given up first:
# the clock, modules, the reboot of the machine.
[ -n "${BOX_INSIDE:-}" ] || BOX_INSIDE=1 exec setpriv \
  --bounding-set -sys_module,-sys_time,-sys_rawio,-sys_boot,-mac_admin,-mac_override,-syslog,-wake_alarm \
  unshare --mount --propagation private "$0" "$@"
set -eu
directory=$1 cgroup=$2
mkdir -p "$directory/disk" && mount -t tmpfs box "$directory/disk" && cd "$directory/disk" && mkdir upper work root

boot() {
  echo $BASHPID >"$cgroup/cgroup.procs"
  exec unshare --cgroup --pid --mount --uts --ipc --net --fork --kill-child --propagation private bash -euc '
    directory=$1; hostname box; ip link set lo up
    mount -t overlay box -o lowerdir="$(readlink -f "$directory/root")",upperdir=upper,workdir=work root; cd root
    mount -t proc -o nosuid,nodev,noexec proc proc; mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup sys/fs/cgroup
    mount -t tmpfs -o mode=755,nosuid,nodev run run; mount -t tmpfs -o mode=755,nosuid dev dev
    mkdir -p dev/pts dev/shm run/lock; mount -t tmpfs -o mode=1777 shm dev/shm
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts; ln -s pts/ptmx dev/ptmx
    for d in null zero full random urandom tty; do mknod -m 666 dev/$d c $(stat -c "0x%t 0x%T" /dev/$d); done
    ln -s /proc/self/fd dev/fd; for n in 0:stdin 1:stdout 2:stderr; do ln -s fd/${n%:*} dev/${n#*:}; done
    cat /proc/sys/kernel/random/uuid >run/boot_id  # the boot id is the kernel'"'"'s: every boot of the box gets its own
    mount --bind run/boot_id proc/sys/kernel/random/boot_id
    echo 512 >proc/sys/net/unix/max_dgram_qlen  # as systemd does itself, where it may write there
    for p in sys irq bus sysrq-trigger; do
      [ ! -e proc/$p ] || { mount --rbind proc/$p proc/$p; mount -o remount,bind,ro proc/$p; }
    done
    if [ ! -e ../seeded ]; then
      rm -rf etc/systemd/system/*.wants usr/sbin/policy-rc.d etc/machine-id var/log/journal; : >etc/machine-id
      rm -rf opt/portd; [ ! -e "$directory/venv" ] || { mkdir opt/portd; cp -a "$directory/venv/." opt/portd; }
      (. "$directory/seed"); touch ../seeded
    fi
    pivot_root . mnt; umount -l /mnt
    exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system
  ' box "$directory" </dev/null >"$directory/console" 2>&1
}

while read -r word; do
  [ "$word" = boot ] || exit 64
  boot & outer=$!
  echo "booting $outer"
  wait $outer || true
  echo down
done
