"""What every answer of the viewer tells the browser to allow; used by the application."""

from __future__ import annotations


def security_headers(host: str) -> dict[str, str]:
    """What every answer says to the browser.

    Args:
        host: that was asked for, with its port; it has been allowed.
    """
    policy = "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            # Not every browser counts WebSockets of the same host as 'self'.
            f"connect-src 'self' ws://{host} wss://{host}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
    }
