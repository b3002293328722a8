#!/usr/bin/env bash
# Puts the programs of one folder, the libraries they load and a list of where those come from into
# another folder: the root of an image.
#
#   assemble.sh BIN ROOT
#
# ROOT/usr/share/clusterkv/sbom.spdx.json (SPDX 2.3) names every Debian package whose files are in
# it.
set -euo pipefail

bin=$1
root=$2
programs=(clusterkv-server ckv)
mkdir -p "$root"/{usr/bin,usr/share/clusterkv,etc,tmp}
chmod 1777 "$root/tmp"
echo 'clusterkv:x:65532:65532:clusterkv:/:/sbin/nologin' >"$root/etc/passwd"
echo 'clusterkv:x:65532:' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
cp LICENSE "$root/usr/share/clusterkv/"

for program in "${programs[@]}"; do
  install -s -m 755 "$bin/$program" "$root/usr/bin/$program"
done

# What the loader would load for these programs and libraries, and the loader itself.
loaded_by() {
  local file of
  for file; do
    of=$(ldd "$file")
    if grep 'not found' <<<"$of" >&2; then return 1; fi
    grep -o '/[^ ]*\.so[^ ]*' <<<"$of" || true
  done
}
files=$(loaded_by "${programs[@]/#/$root/usr/bin/}")
# Looked up at start, where the server has CUDA: NCCL, and what that looks up for InfiniBand and
# RoCE.
if grep -q libnccl.so.2 "$root/usr/bin/clusterkv-server"; then
  nccl=$(ldconfig -p | sed -n 's/^\tlibnccl\.so\.2 .* => //p' | head -n 1)
  [ -n "$nccl" ] || { echo "assemble.sh: no libnccl.so.2 in this base" >&2; exit 1; }
  verbs=$(dpkg -L libibverbs1 ibverbs-providers | grep -E '^/usr/lib/.*\.so')
  # shellcheck disable=SC2086
  files+=$'\n'$nccl$'\n'$verbs$'\n'$(loaded_by "$nccl" $verbs)
  cp -r /etc/libibverbs.d "$root/etc/"
  # By it NVIDIA's container runtime knows in which folder the driver's libraries are looked for.
  cp /etc/debian_version "$root/etc/"
fi

copy_file() {  # with the links that lead to it
  local file target
  file=$(readlink -f "$(dirname "$1")")/$(basename "$1")
  mkdir -p "$root$(dirname "$file")"
  cp -P "$file" "$root$file"
  [ -L "$file" ] || return 0
  target=$(readlink "$file")
  case $target in /*) ;; *) target=$(dirname "$file")/$target ;; esac
  copy_file "$target"
}
# As in the base, where /lib is /usr/lib.
mkdir -p "$root/usr/lib" "$root/usr/lib64"
ln -s usr/lib usr/lib64 "$root/"
for file in $files; do copy_file "$file"; done
libraries=$(find "$root/usr/lib" "$root/usr/lib64" -type f | sed "s|^$root||" | sort)
# NVIDIA's container runtime adds the driver's libraries to a cache that is there, and to no other.
for library in $libraries; do dirname "$library"; done | grep -v '/libibverbs$' | sort -u \
  >"$root/etc/ld.so.conf"
ldconfig -r "$root"

# Every library belongs to a package; merged /usr means that dpkg may know it by the other path.
package_of() {
  { dpkg -S "$1" || dpkg -S "${1#/usr}"; } 2>/dev/null | head -n 1 | cut -d: -f1
}
packages=$(for library in $libraries; do
  package=$(package_of "$library")
  [ -n "$package" ] || { echo "assemble.sh: no package owns $library" >&2; exit 1; }
  echo "$package"
done | sort -u)

version=$(sed -n 's/^project(clusterkv VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
spdx_id() { echo "$1" | tr -c 'A-Za-z0-9.\n' '-'; }
spdx_package() {  # id name version source
  printf '    {"SPDXID": "SPDXRef-%s", "name": "%s", "versionInfo": "%s",\n' "$1" "$2" "$3"
  printf '     "downloadLocation": "NOASSERTION", "filesAnalyzed": false,\n'
  printf '     "externalRefs": [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl",\n'
  printf '                       "referenceLocator": "%s"}]}' "$4"
}
. /etc/os-release
{
  printf '{"spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT",\n'
  printf ' "name": "clusterkv-%s",\n' "$version"
  printf ' "documentNamespace": "https://spdx.org/spdxdocs/clusterkv-%s-%s",\n' "$version" \
    "$(cat "$root"/usr/bin/* | sha256sum | cut -c1-16)"
  printf ' "creationInfo": {"created": "%s", "creators": ["Tool: assemble.sh"]},\n' \
    "$(date -u -d "@${SOURCE_DATE_EPOCH:-$(date +%s)}" +%Y-%m-%dT%H:%M:%SZ)"
  printf ' "packages": [\n'
  spdx_package clusterkv clusterkv "$version" "pkg:generic/clusterkv@$version"
  for package in $packages; do
    read -r name architecture package_version < <(
      dpkg-query -W -f '${Package} ${Architecture} ${Version}\n' "$package")
    printf ',\n'
    spdx_package "$(spdx_id "$name")" "$name" "$package_version" \
      "pkg:deb/$ID/$name@$package_version?arch=$architecture&distro=$ID-$VERSION_ID"
  done
  printf '\n ],\n "relationships": [\n'
  printf '    {"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES",\n'
  printf '     "relatedSpdxElement": "SPDXRef-clusterkv"}'
  for package in $packages; do
    printf ',\n    {"spdxElementId": "SPDXRef-clusterkv", "relationshipType": "DEPENDS_ON",\n'
    printf '     "relatedSpdxElement": "SPDXRef-%s"}' "$(spdx_id "$package")"
  done
  printf '\n ]}\n'
} >"$root/usr/share/clusterkv/sbom.spdx.json"
echo "$(echo "$libraries" | wc -l) libraries of $(echo "$packages" | wc -l) packages"
