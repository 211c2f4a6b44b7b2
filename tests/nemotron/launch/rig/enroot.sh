#!/bin/sh
# A stand-in for `enroot import --output FILE docker://REGISTRY#IMAGE`: a squashfs that says where it
# comes from. An image named "missing" is not in any registry; one named "slow" takes its time.
set -eu
[ "$1" = import ] && [ "$2" = --output ] || { echo "[ERROR] Invalid command" >&2; exit 1; }
file=$3 uri=$4
case "$uri" in
docker://*) ;;
*) echo "[ERROR] Invalid image reference: $uri" >&2; exit 1 ;;
esac
[ ! -e "$file" ] || { echo "[ERROR] File already exists: $file" >&2; exit 1; }
case "$uri" in
*missing*) echo "[ERROR] https://registry/v2/ returned error code: 401 Unauthorized" >&2; exit 1 ;;
*slow*) : > "$file"; sleep 30 ;;
esac
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/etc"
echo "$uri $(date +%s.%N)" > "$tree/etc/rig-image"
mksquashfs "$tree" "$file" -noappend -quiet -no-progress -all-root >&2
