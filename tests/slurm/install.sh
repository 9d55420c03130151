#!/bin/sh
# Installs what tests/slurm/cluster.py runs, from the packages of Debian or Ubuntu, as root.
#
# Debian starts a service as it installs it, and at every boot. The cluster runs daemons of its own and needs the programs only, so the
# services that this install brings are stopped and disabled again. One that was installed before is left alone: not upgraded, not
# restarted, not stopped. Of MariaDB only the program is installed (mariadb-server-core has no service); nothing is removed to make room.
set -eu
packages="slurm-client slurmctld slurmd slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core"
services="munge slurmctld slurmd slurmdbd"  # each in the package of its name

if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "error: the SLURM tests need $packages; install them, or run this as root on Debian or Ubuntu" >&2
    exit 2
fi
new=
for service in $services; do
    dpkg-query --show --showformat '${db:Status-Status}' "$service" 2> /dev/null | grep -qx installed || new="$new $service"
done

export DEBIAN_FRONTEND=noninteractive
echo "installing $packages"
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -qq -y --no-install-recommends --no-upgrade --no-remove $packages > /dev/null

for service in $new; do
    service "$service" stop > /dev/null 2>&1 || true      # was not started where there is no configuration or a policy-rc.d
    update-rc.d "$service" disable > /dev/null 2>&1 || true
done
