//! The page at `/`: files of this crate, compiled in, so that the binary is all there is to
//! install and a page never belongs to another version than its server.
//!
//! The files hold no data and need no key; what they show comes from the operator's API, with
//! the operator's key. The policy that goes with them lets nothing load from elsewhere, no
//! script stand in the page, and no other page frame it. A bundler and a framework were the
//! alternative: a few small modules need neither, and are read as they were written.

use axum::http::header::{self, HeaderName};
use axum::routing::get;
use utoipa_axum::router::OpenApiRouter;

use crate::state::AppState;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// A file of the page: where it is asked for, what it is, what is in it.
type File = (&'static str, &'static str, &'static str);

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const PICTURE: &str = "image/svg+xml";

const FILES: [File; 13] = [
    ("/", HTML, include_str!("../web/index.html")),
    ("/dashboard/style.css", CSS, include_str!("../web/style.css")),
    ("/dashboard/icon.svg", PICTURE, include_str!("../web/icon.svg")),
    ("/dashboard/theme.js", SCRIPT, include_str!("../web/theme.js")),
    ("/dashboard/main.js", SCRIPT, include_str!("../web/main.js")),
    ("/dashboard/api.js", SCRIPT, include_str!("../web/api.js")),
    ("/dashboard/charts.js", SCRIPT, include_str!("../web/charts.js")),
    ("/dashboard/chat.js", SCRIPT, include_str!("../web/chat.js")),
    ("/dashboard/dom.js", SCRIPT, include_str!("../web/dom.js")),
    ("/dashboard/format.js", SCRIPT, include_str!("../web/format.js")),
    ("/dashboard/prefixes.js", SCRIPT, include_str!("../web/prefixes.js")),
    ("/dashboard/requests.js", SCRIPT, include_str!("../web/requests.js")),
    ("/dashboard/storage.js", SCRIPT, include_str!("../web/storage.js")),
];

pub(crate) fn routes() -> OpenApiRouter<AppState> {
    FILES.into_iter().fold(OpenApiRouter::new(), |router, (path, media_type, text)| {
        router.route(path, get(move || async move { (headers(media_type), text) }))
    })
}

fn headers(media_type: &'static str) -> [(HeaderName, &'static str); 5] {
    [
        (header::CONTENT_TYPE, media_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A newer server's page must not mix with an older one's files.
        (header::CACHE_CONTROL, "no-cache"),
    ]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn folder() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("web")
    }

    #[test]
    fn every_file_of_the_page_is_served_under_its_name() {
        for entry in std::fs::read_dir(folder()).expect("the folder of the page") {
            let name = entry.expect("an entry").file_name().into_string().expect("a name in UTF-8");
            let path = if name == "index.html" { "/".to_owned() } else { format!("/dashboard/{name}") };
            let text = std::fs::read_to_string(folder().join(&name)).expect("a text");
            assert!(FILES.iter().any(|(served, _, what)| *served == path && *what == text), "{name} is not served");
        }
    }

    #[test]
    fn the_page_names_no_other_host_and_parses_no_markup() {
        for (path, _, text) in FILES {
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for word in
                ["http:", "https:", "//cdn", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
            {
                assert!(!text.contains(word), "{path} has {word} in it");
            }
        }
    }
}
