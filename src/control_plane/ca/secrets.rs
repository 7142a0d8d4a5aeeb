//! Secrets by name: read, made, and changed only if nobody else has changed them meanwhile.
//!
//! They are read as text and parsed here. The library's typed calls put an answer that they cannot parse into a log
//! line, and these answers hold keys.

use crate::telemetry::limit::shortened;
use crate::telemetry::log::with_causes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::Client;
use kube::api::{GetParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;
use zeroize::{Zeroize, Zeroizing};

/// How long the API may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// The entries of a Secret.
pub type Data = BTreeMap<String, Zeroizing<Vec<u8>>>;

/// Entries to write; `None` for one that is to be removed.
pub type Entries = BTreeMap<&'static str, Option<Zeroizing<Vec<u8>>>>;

/// A Secret as it was read.
pub struct Secret {
    /// Changes with the content.
    pub version: String,
    /// The entries.
    pub data: Data,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({}, {} entries)", self.version, self.data.len())
    }
}

/// Why the API does not give a Secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API refuses or cannot be reached.
    #[error("the Secret {name}: {}", shortened(with_causes(.source)))]
    Api {
        /// The Secret.
        name: String,
        /// The library's error.
        source: kube::Error,
    },
    /// It does not answer in time.
    #[error("the Secret {0}: the Kubernetes API has not answered within {seconds} s", seconds = DEADLINE.as_secs())]
    Late(String),
    /// The answer is malformed.
    #[error("the Secret {name}: the answer cannot be read at line {line}, column {column}")]
    Malformed {
        /// The Secret.
        name: String,
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
}

/// What came of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is done.
    Done,
    /// Somebody else was faster.
    Lost,
}

/// The Secrets of one namespace.
pub struct Secrets {
    client: Client,
    namespace: String,
    requests: Request,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.namespace)
    }
}

#[derive(Deserialize)]
struct Body {
    metadata: Metadata,
    #[serde(default)]
    data: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    resource_version: String,
}

impl Secrets {
    /// The Secrets of a namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        let requests = Request::new(format!("/api/v1/namespaces/{namespace}/secrets"));
        Self { client, namespace: namespace.to_owned(), requests }
    }

    /// Namespace and name, for messages.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    /// A Secret; `None` if there is none of this name.
    pub async fn get(&self, name: &str) -> Result<Option<Secret>, SecretError> {
        let request = self.requests.get(name, &GetParams::default());
        let mut text = match self.ask(name, request).await {
            Ok(text) => text,
            Err(SecretError::Api { source: kube::Error::Api(status), .. }) if status.code == 404 => return Ok(None),
            Err(error) => return Err(error),
        };
        let secret = self.parse(name, &text);
        text.zeroize();
        secret.map(Some)
    }

    /// Makes a Secret. [`Written::Lost`] if there is one.
    pub async fn create(&self, name: &str, data: &Data) -> Result<Written, SecretError> {
        let data: BTreeMap<&str, String> =
            data.iter().map(|(key, value)| (key.as_str(), STANDARD.encode(value))).collect();
        let body = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": {
                "name": name, "namespace": self.namespace, "labels": {"app.kubernetes.io/managed-by": "culvert"},
            },
            "data": data,
        });
        let request = self.requests.create(&PostParams::default(), body.to_string().into_bytes());
        self.written(name, request).await
    }

    /// Sets the entries with a value and removes those without. [`Written::Lost`] if the Secret is not at `version` any
    /// more.
    pub async fn patch(&self, name: &str, version: &str, entries: &Entries) -> Result<Written, SecretError> {
        let data: BTreeMap<&str, Option<String>> =
            entries.iter().map(|(key, value)| (*key, value.as_ref().map(|value| STANDARD.encode(value)))).collect();
        let body: Value = json!({"metadata": {"resourceVersion": version}, "data": data});
        let request = self.requests.patch(name, &PatchParams::default(), &Patch::Merge(body));
        self.written(name, request).await
    }

    async fn written(
        &self,
        name: &str,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<Written, SecretError> {
        match self.ask(name, request).await {
            Ok(mut answer) => {
                answer.zeroize();
                Ok(Written::Done)
            }
            Err(SecretError::Api { source: kube::Error::Api(status), .. }) if status.code == 409 => Ok(Written::Lost),
            Err(error) => Err(error),
        }
    }

    async fn ask(
        &self,
        name: &str,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<String, SecretError> {
        let failed = |source| SecretError::Api { name: self.path(name), source };
        let request = request.map_err(|error| failed(kube::Error::BuildRequest(error)))?;
        match tokio::time::timeout(DEADLINE, self.client.request_text(request)).await {
            Ok(answer) => answer.map_err(failed),
            Err(_) => Err(SecretError::Late(self.path(name))),
        }
    }

    /// Reads a Secret. Errors say where, not what: the text holds keys.
    fn parse(&self, name: &str, text: &str) -> Result<Secret, SecretError> {
        let malformed = |line, column| SecretError::Malformed { name: self.path(name), line, column };
        let body: Body = serde_json::from_str(text).map_err(|error| malformed(error.line(), error.column()))?;
        let mut data = Data::new();
        for (key, mut value) in body.data {
            let decoded = STANDARD.decode(&value);
            value.zeroize();
            data.insert(key, decoded.map_err(|_| malformed(0, 0))?.into());
        }
        Ok(Secret { version: body.metadata.resource_version, data })
    }
}
