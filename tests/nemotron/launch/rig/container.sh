# Builds the root of a container in the mount namespace that it runs in, in $RIG_ROOT/root: this
# machine's root, below the image $RIG_IMAGE if there is one, with $RIG_MOUNTS. Called by pyxis.c and
# by the Lepton rig.
set -eu
mount --make-rprivate / 2>/dev/null || true
mkdir -p "$RIG_ROOT"
mount -t tmpfs tmpfs "$RIG_ROOT"
cd "$RIG_ROOT"
mkdir image upper work root
if [ -n "$RIG_IMAGE" ]; then
    [ -f "$RIG_IMAGE" ] || { echo "no image $RIG_IMAGE" >&2; exit 1; }
    mount -t squashfs -o loop,ro "$RIG_IMAGE" image 2>/dev/null ||
        unsquashfs -q -n -f -d image "$RIG_IMAGE" >/dev/null
fi
mount -t overlay overlay -o lowerdir=image:/,upperdir=upper,workdir=work root
for place in proc sys dev tmp run; do
    mkdir -p "root/$place"
    mount --rbind "/$place" "root/$place"
done
# As enroot does: a container knows the names of the cluster.
mount --bind /etc/hosts root/etc/hosts
IFS=,
for pair in $RIG_MOUNTS; do
    source=${pair%%:*} target=${pair#*:}
    target=${target%%:*}
    [ -e "$source" ] || { echo "mount source $source is not there" >&2; exit 1; }
    mkdir -p "root$target"
    mount --rbind "$source" "root$target"
done
