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

# What the loader would load, and the loader itself.
libraries=$(for program in "${programs[@]}"; do ldd "$root/usr/bin/$program"; done |
  grep -o '/[^ ]*\.so[^ ]*' | sort -u)
# Looked up at start, where the server has CUDA.
if grep -q libnccl.so.2 "$root/usr/bin/clusterkv-server"; then
  nccl=$(ldconfig -p | sed -n 's/^\tlibnccl\.so\.2 .* => //p' | head -n 1)
  [ -n "$nccl" ] || { echo "assemble.sh: no libnccl.so.2 in this base" >&2; exit 1; }
  libraries+=$'\n'$nccl
fi
if for program in "${programs[@]}"; do ldd "$root/usr/bin/$program"; done | grep 'not found'; then
  exit 1
fi
for library in $libraries; do
  mkdir -p "$root$(dirname "$library")"
  cp -L "$library" "$root$library"
done

# Every library belongs to a package; merged /usr means that dpkg may know it by the other path.
package_of() {
  { dpkg -S "$1" || dpkg -S "$(readlink -f "$1")" || dpkg -S "/usr$1"; } 2>/dev/null |
    head -n 1 | cut -d: -f1
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
