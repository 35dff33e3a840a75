"""TLS of the gateway's own ports: one context from the files that the configuration names. Knows no socket."""

from __future__ import annotations

import ssl
from pathlib import Path

from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError


def tls_context(section: GatewaySection) -> ssl.SSLContext | None:
    """None where the gateway speaks plain HTTP. Raises ConfigError naming the option and the file that is wrong."""
    if section.ssl_certfile is None or section.ssl_keyfile is None:
        return None
    for option, file in (
        ("ssl_certfile", section.ssl_certfile),
        ("ssl_keyfile", section.ssl_keyfile),
        ("ssl_ca_certs", section.ssl_ca_certs),
    ):
        _check_readable(option, file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty passphrase: without one OpenSSL would ask at the terminal for that of an encrypted key, and wait.
        context.load_cert_chain(section.ssl_certfile, section.ssl_keyfile, password="")
    except ssl.SSLError as error:
        why = (
            "they do not belong together"
            if error.reason == "KEY_VALUES_MISMATCH"
            else f"they must be PEM, the key without a passphrase: {error}"
        )
        raise ConfigError(
            f"gateway.ssl_certfile {section.ssl_certfile} and gateway.ssl_keyfile {section.ssl_keyfile} cannot be used: {why}"
        ) from error
    if section.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(section.ssl_ca_certs)
        except ssl.SSLError as error:
            raise ConfigError(f"gateway.ssl_ca_certs {section.ssl_ca_certs} must hold PEM certificates: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(option: str, file: Path | None) -> None:
    if file is None:
        return
    try:
        file.read_bytes()
    except OSError as error:
        raise ConfigError(f"gateway.{option} {file} cannot be read: {error.strerror}") from error
