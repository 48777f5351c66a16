//! Opens GGUF files: metadata by key, tensors widened to `f32`.
//!
//! Parsing and dequantising are candle's, which knows every quantised type; a reader of
//! our own would be twenty block formats to keep right. What we add: typed errors.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use sha2::{Digest, Sha256};

use crate::error::{EngineError, Result};

/// An opened GGUF file.
pub(crate) struct Gguf {
    path: PathBuf,
    content: Content,
}

impl Gguf {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |source| EngineError::ReadModel { path: path.to_owned(), source };
        let bad = |reason: String| EngineError::BadModel { path: path.to_owned(), reason };
        let mut file = File::open(path).map_err(io)?;
        let mut magic = [0u8; 4];
        let read = file.by_ref().take(4).read(&mut magic).map_err(io)?;
        if read < 4 || &magic != b"GGUF" {
            return Err(bad("it does not begin with GGUF".to_owned()));
        }
        let mut reader = BufReader::new(file);
        reader.rewind().map_err(io)?;
        // The parser checks what it reads; a panic left in it must not take the caller down.
        let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut reader)))
            .map_err(|_| bad("its header is damaged".to_owned()))?
            .map_err(|error| bad(error.to_string()))?;
        Ok(Self { path: path.to_owned(), content })
    }

    pub(crate) fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// A reader of its own for each thread.
    pub(crate) fn reader(&self) -> Result<File> {
        File::open(&self.path).map_err(|source| EngineError::ReadModel { path: self.path.clone(), source })
    }

    /// A tensor as `f32` in row-major order; its shape must be `dims`.
    pub(crate) fn tensor(&self, reader: &mut File, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        let info = self.content.tensor_infos.get(name).ok_or_else(|| EngineError::Missing(format!("tensor {name}")))?;
        if info.shape.dims() != dims {
            let got = info.shape.dims();
            return Err(EngineError::Unsupported(format!("tensor {name} has shape {got:?}, expected {dims:?}")));
        }
        info.read(reader, self.content.tensor_data_offset, &Device::Cpu)
            .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>())
            .map_err(|error| EngineError::BadModel { path: self.path.clone(), reason: format!("{name}: {error}") })
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match self.content.metadata.get(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        match self.content.metadata.get(key) {
            Some(Value::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    pub(crate) fn number(&self, key: &str) -> Option<usize> {
        let value = match self.content.metadata.get(key)? {
            Value::U8(v) => u64::from(*v),
            Value::U16(v) => u64::from(*v),
            Value::U32(v) => u64::from(*v),
            Value::U64(v) => *v,
            Value::I32(v) => u64::try_from(*v).ok()?,
            Value::I64(v) => u64::try_from(*v).ok()?,
            _ => return None,
        };
        usize::try_from(value).ok()
    }

    pub(crate) fn real(&self, key: &str) -> Option<f64> {
        match self.content.metadata.get(key)? {
            Value::F32(v) => Some(f64::from(*v)),
            Value::F64(v) => Some(*v),
            _ => None,
        }
    }

    pub(crate) fn texts(&self, key: &str) -> Option<Vec<&str>> {
        self.list(key)?.iter().map(|v| if let Value::String(text) = v { Some(text.as_str()) } else { None }).collect()
    }

    pub(crate) fn reals(&self, key: &str) -> Option<Vec<f32>> {
        self.list(key)?.iter().map(|v| if let Value::F32(v) = v { Some(*v) } else { None }).collect()
    }

    pub(crate) fn integers(&self, key: &str) -> Option<Vec<i64>> {
        let integer = |v: &Value| match v {
            Value::I32(v) => Some(i64::from(*v)),
            Value::U32(v) => Some(i64::from(*v)),
            Value::I8(v) => Some(i64::from(*v)),
            Value::U8(v) => Some(i64::from(*v)),
            _ => None,
        };
        self.list(key)?.iter().map(integer).collect()
    }

    pub(crate) fn require_number(&self, key: &str) -> Result<usize> {
        self.number(key).ok_or_else(|| EngineError::Missing(format!("the number {key}")))
    }

    /// SHA-256 of the whole file, in lower-case hexadecimal.
    pub(crate) fn sha256(&self) -> Result<String> {
        sha256_file(&self.path).map_err(|source| EngineError::ReadModel { path: self.path.clone(), source })
    }

    fn list(&self, key: &str) -> Option<&[Value]> {
        match self.content.metadata.get(key) {
            Some(Value::Array(values)) => Some(values),
            _ => None,
        }
    }
}

/// SHA-256 of a file, in lower-case hexadecimal.
pub(crate) fn sha256_file(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(buffer.get(..read).unwrap_or_default());
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
