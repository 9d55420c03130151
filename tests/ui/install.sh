#!/bin/sh
# Installs the browser that tests/ui opens MLflow's UI with, from the packages of Debian, as root. (Ubuntu's chromium is a snap, which
# its chromedriver cannot start as root.) The fonts are for the text of pages: without any a headless browser draws none.
set -eu
packages="chromium chromium-driver fonts-dejavu-core"

if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "error: the test of MLflow's UI needs $packages; install them, or run this as root on Debian" >&2
    exit 2
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing $packages"
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -qq -y --no-install-recommends --no-upgrade --no-remove $packages > /dev/null
