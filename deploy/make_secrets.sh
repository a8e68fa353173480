#!/bin/sh
# make_secrets.sh FOLDER: makes the secrets of compose.yaml that are not there yet: token and passwords, and with TLS=1
# an authority and a certificate. What is there is kept: a password of a database that exists cannot be made anew.
set -eu
folder=${1:?usage: make_secrets.sh FOLDER}
umask 027
if ! mkdir -p "$folder" 2>/dev/null || [ ! -w "$folder" ]; then
  echo "secrets: $folder cannot be written by user $(id -u); next: chown it to that user, or let user 10001 read and fill it" >&2
  exit 2
fi
for name in token redis_password postgres_password grafana_password; do
  file=$folder/$name
  if [ ! -s "$file" ]; then
    # 32 random bytes as letters and digits: none of them needs quoting in a URL, a header or a shell.
    od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' > "$file.draft"
    chmod 0440 "$file.draft"
    mv "$file.draft" "$file"
    echo "secrets: made $file"
  fi
done
rmdir "$folder/tls" 2>/dev/null || true  # an empty one
if [ -n "${TLS:-}" ] && [ ! -e "$folder/tls" ]; then
  # One certificate for all containers, for a year. The authority's key is kept by nobody: remove the folder tls, and the
  # next start makes an authority and a certificate anew.
  draft=$(mktemp -d)
  rm -rf "$folder/tls.draft"
  preceptor certificates "$draft" > /dev/null
  # For group 0 too, as the passwords are: Redis and PostgreSQL show this certificate.
  chmod -R g+rX "$draft/house"
  cp -R "$draft/house" "$folder/tls.draft"
  mv "$folder/tls.draft" "$folder/tls"  # whole, or not at all
  rm -rf "$draft"
  echo "secrets: made $folder/tls"
fi
