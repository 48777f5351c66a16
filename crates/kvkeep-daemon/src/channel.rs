//! Frames over a socket, and the descriptors that come with the first one. Nothing here waits longer than it is told.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kvkeep::tiers::Deadline;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, send, sendmsg,
};

use crate::wire::{Answer, MAX_FRAME_BYTES, Message, Request};

/// What is read at once.
const READ_BYTES: usize = 64 << 10;
/// What a frame that has begun may take, and one that is sent.
const FRAME_TIME: Duration = Duration::from_secs(5);

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    /// What has come and was not taken yet.
    buffer: Vec<u8>,
}

impl Channel {
    pub(crate) fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(FRAME_TIME))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    pub(crate) fn connect(socket: &Path) -> io::Result<Self> {
        Self::over(UnixStream::connect(socket)?)
    }

    /// Asks, and waits for the answer until the deadline.
    pub(crate) fn ask(&mut self, request: &Request, deadline: Deadline) -> io::Result<Answer> {
        self.send(&request.encode())?;
        self.answer(deadline)
    }

    pub(crate) fn answer(&mut self, deadline: Deadline) -> io::Result<Answer> {
        let frame = self.receive(deadline)?.ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))?;
        Answer::decode(&frame)
    }

    /// One frame.
    pub(crate) fn send(&mut self, body: &[u8]) -> io::Result<()> {
        self.write(&framed(body)?)
    }

    /// One frame, with a descriptor.
    pub(crate) fn send_with(&mut self, body: &[u8], file: BorrowedFd<'_>) -> io::Result<()> {
        let frame = framed(body)?;
        let files = [file];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        let sent = sendmsg(&self.stream, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL)?;
        self.write(frame.get(sent..).unwrap_or_default())
    }

    /// All of it. A peer that has gone is an error, and no signal: this may be a library of somebody's.
    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match send(&self.stream, bytes, SendFlags::NOSIGNAL) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next frame; `None` if none has begun by the deadline.
    pub(crate) fn receive(&mut self, deadline: Deadline) -> io::Result<Option<Vec<u8>>> {
        let mut until = deadline;
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(Some(frame));
            }
            if !self.wait_until(until)? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::TimedOut.into()) };
            }
            let had = self.buffer.len();
            self.buffer.resize(had + READ_BYTES, 0);
            let read = self.stream.read(self.buffer.get_mut(had..).unwrap_or_default());
            self.buffer.truncate(had + read.as_ref().map_or(0, |read| *read));
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if had == 0 => until = Deadline::after(FRAME_TIME.min(deadline.left().max(FRAME_TIME / 5))),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return if had == 0 { Ok(None) } else { Err(io::ErrorKind::TimedOut.into()) };
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sets how long a read waits; `false` if there is no time at all.
    fn wait_until(&self, deadline: Deadline) -> io::Result<bool> {
        let left = deadline.left();
        if left.is_zero() {
            return Ok(false);
        }
        self.stream.set_read_timeout(Some(left)).map(|()| true)
    }

    /// The first frame that has come whole.
    fn buffered(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(head) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let bytes = u32::from_le_bytes(*head) as usize;
        if bytes > MAX_FRAME_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that is longer than any message"));
        }
        let Some(frame) = self.buffer.get(4..4 + bytes).map(<[u8]>::to_vec) else { return Ok(None) };
        self.buffer.drain(..4 + bytes);
        Ok(Some(frame))
    }

    /// The first answer on a connection, and the descriptor that comes with it.
    pub(crate) fn first_answer(&mut self, deadline: Deadline) -> io::Result<(Answer, Option<OwnedFd>)> {
        self.wait_until(deadline)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = vec![0; READ_BYTES];
        let came =
            recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        if came == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(bytes.get(..came).unwrap_or_default());
        Ok((self.answer(deadline)?, file))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn framed(body: &[u8]) -> io::Result<Vec<u8>> {
    let bytes = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_FRAME_BYTES);
    let bytes = bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a message that no frame holds"))?;
    Ok([&bytes.to_le_bytes(), body].concat())
}
