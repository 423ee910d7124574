#!/usr/bin/env bash
# Builds an image step by step with no container engine and no image registry, then runs the quickstart in it as a pod would:
# a user without rights, a read-only root file system, no network, the harness as PID 1. Needs root, buildah and debootstrap.
# usage: bash tests/docker/build.sh [--only-build] [DOCKERFILE]      docker/Dockerfile.cpu by default; 20 minutes or more on 2 cores, most of it compiling
#   IMAGE_DIR       everything that is made, about 10 GB; removed at the end unless it is set
#   BASE_ROOTFS     a tar of a root file system to begin with, instead of Debian 12 by debootstrap
# pip in the build is configured as pip is here: the indexes, folders and certificates that it names are mounted, the Dockerfile is as it is.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
only_build=no
if [ "${1:-}" = --only-build ]; then only_build=yes; shift; fi
dockerfile=${1:-docker/Dockerfile.cpu}
cd "$repository"

if [ "$(id -u)" != 0 ] || ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
  echo "tests/docker/build.sh: needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap)." >&2
  exit 2
fi
if [ -n "${IMAGE_DIR:-}" ]; then place=$IMAGE_DIR keep=yes; else place=$(mktemp -d) keep=no; fi
mkdir -p "$place/work"

container=""
clean_up() {
  if [ -n "$container" ]; then store umount "$container" >/dev/null; store rm "$container" >/dev/null; fi
  if [ $keep = no ]; then rm -rf "$place"; fi
}
trap clean_up EXIT
trap "exit 143" INT TERM

store() { # buildah with a store of its own; vfs needs nothing from the kernel
  buildah --root "$place/store" --runroot "$place/run" --storage-driver vfs "$@"
}

make_base() { # NAME ...: an image under each name
  local tar=${BASE_ROOTFS:-$place/rootfs.tar} mirror fresh name
  if [ ! -e "$tar" ]; then
    # shellcheck disable=SC2016  # apt's own fields
    mirror=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
      awk '$1 == "bookworm" && $2 == "main" { print $3; exit }')
    if [ -z "$mirror" ]; then
      echo "tests/docker/build.sh: apt knows no mirror of Debian 12; give a BASE_ROOTFS." >&2
      return 2
    fi
    debootstrap --variant=minbase bookworm "$place/rootfs" "$mirror" >"$place/debootstrap.log"
    tar -C "$place/rootfs" -cf "$tar" .
    rm -rf "$place/rootfs"
  fi
  fresh=$(store from scratch)
  store add --quiet "$fresh" "$tar" / >/dev/null
  store config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$fresh"
  store commit --quiet "$fresh" "$1" >/dev/null
  store rm "$fresh" >/dev/null
  for name in "${@:2}"; do store tag "$1" "$name"; done
}

pip_mounts() { # the options that make pip in the build see what pip sees here
  local line key value words word
  printf '[global]\n' >"$place/pip.conf"
  while IFS= read -r line; do
    key=${line%%=*} value=${line#*=}
    key=${key##*.} value=${value//\'/}
    case $key in
      cert | index-url | extra-index-url | find-links) ;;
      *) continue ;;
    esac
    if grep -q "^$key = " "$place/pip.conf"; then continue; fi
    if [ "$key" = cert ]; then # elsewhere, for the build installs Debian's own bundle
      printf '%s\n' --volume "$value:/etc/pip-ca.crt:ro"
      value=/etc/pip-ca.crt
    fi
    printf '%s = %s\n' "$key" "$value" >>"$place/pip.conf"
    read -ra words <<<"${value//file:\/\//}"
    for word in "${words[@]}"; do
      if [[ $key = *index-url ]]; then word=$(dirname "$word"); fi # an index in a folder points to files beside it
      if [[ $word = /?* && -e $word ]]; then printf '%s\n' --volume "$word:$word:ro"; fi
    done
  done < <(python3 -m pip config list)
  printf '%s\n' --volume "$place/pip.conf:/etc/pip.conf:ro"
}

as_a_pod() { # ROOT COMMAND ...: in namespaces of its own, with the image's settings and nothing else
  local root=$1 tmp
  shift
  tmp=noexec,nosuid,nodev,$(sed -n 's/^  tmpfs: \["\/tmp:\([a-z,]*\)"\].*/\1/p' docker/compose.yaml) # docker's own, then those that are documented
  # shellcheck disable=SC2016  # for the inner shell
  tmp=$tmp unshare --mount --pid --fork --net --ipc --uts --kill-child bash -euo pipefail -c '
    root=$1; shift
    ip link set lo up
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o "mode=1777,$tmp" tmpfs "$root/tmp"
    mount --bind "$0" "$root/work"
    mount -o remount,bind,ro "$root"
    exec chroot --userspec=10001:10001 "$root" env -i --chdir=/work "$@"' "$place/work" "$root" "$@"
}

settings() { # the image's environment and folder, as words for env
  store inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' harness-under-test | grep .
}

began=$SECONDS
mapfile -t bases < <(sed -n 's/^ARG [A-Z_]*IMAGE=//p' "$dockerfile")
if ! store inspect --type image "${bases[0]}" >/dev/null 2>&1; then make_base "${bases[@]}"; fi
echo "base image ready after $((SECONDS - began)) s: ${bases[*]}"
mapfile -t mounts < <(pip_mounts)
store bud --isolation chroot --pull-never "${mounts[@]}" --ignorefile "$dockerfile.dockerignore" \
  --tag harness-under-test --file "$dockerfile" .
echo "$dockerfile built after $((SECONDS - began)) s"
if [ $only_build = yes ]; then exit 0; fi

container=$(store from --pull-never harness-under-test)
root=$(store mount "$container")
du -sh "$root"
chown 10001:10001 "$place/work"
mapfile -t image < <(settings)
as_a_pod "$root" "${image[@]}" harness --version
# shellcheck disable=SC2016  # for the inner shell
as_a_pod "$root" "${image[@]}" bash -c '! touch /opt/harness/x 2>/dev/null && [ "$(id -u)" = 10001 ] && [ $$ = 1 ]'
# shellcheck disable=SC2016  # for the inner shell
as_a_pod "$root" "${image[@]}" bash -c 'cp "$(python -c "import _ctypes; print(_ctypes.__file__)")" /tmp/x.so && python -c "import ctypes; ctypes.CDLL(\"/tmp/x.so\")"'
as_a_pod "$root" "${image[@]}" python -m harness.cli.quickstart
echo "built and run after $((SECONDS - began)) s"
