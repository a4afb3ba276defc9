// The file calls of one process below one directory: recorded in order, failed, cut short, or its end.
//
// Preloaded (LD_PRELOAD) it stands before libc, so it sees what SQLite, Rust and Python alike ask of
// the kernel; a wrapper in Python would see none of SQLite's calls. The process itself says what is
// watched: io_watch, io_log, io_fail, io_mark and io_calls are called through ctypes.
//
// A call is counted when it could change the directory (opening to create or truncate, writing,
// truncating, synchronising, renaming, unlinking, making or removing a directory) or when it opens
// what is there. Calls are made one at a time, so that the order of the log is that of the kernel.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// As tests/faults/recording.py reads them.
enum { OPEN = 1, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MAKE, MARK, SYNC_REFUSED, LOOK };
enum { FAIL = 1, SHORTEN, EXIT, TEAR };

typedef struct {
  uint32_t kind, file;  // of a descriptor: the number of the open that made it
  int64_t offset;       // of a write; a truncation's length; a mark's number; an open's inode
  uint32_t flags, path_bytes, other_bytes, data_bytes;
} Record;

#define DESCRIPTORS 4096
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_bytes;
static int log_to = -1;
static uint32_t file_of[DESCRIPTORS], files;
static int64_t calls, fail_at;
static int fail_how, fail_code, fail_after;
static uint32_t fail_kinds;

static void* next(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}
#define NEXT(name)                            \
  static __typeof__(name)* real = NULL;       \
  if (!real) real = (__typeof__(real))next(#name)

static int watched(const char* path) {
  return root_bytes && !strncmp(path, root, root_bytes) &&
         (path[root_bytes] == '/' || path[root_bytes] == '\0');
}

// A path as the kernel would find it, without following links.
static const char* absolute(int folder, const char* path, char* room) {
  if (path[0] == '/') return path;
  char base[PATH_MAX];
  if (folder == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) return path;
  } else {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
    const ssize_t bytes = readlink(name, base, sizeof base - 1);
    if (bytes < 0) return path;
    base[bytes] = '\0';
  }
  if (snprintf(room, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) abort();
  return room;
}

static void record(Record what, const char* path, const char* other, const void* data) {
  if (log_to < 0) return;
  what.path_bytes = path ? (uint32_t)strlen(path) : 0;
  what.other_bytes = other ? (uint32_t)strlen(other) : 0;
  struct iovec parts[4] = {{&what, sizeof what},
                           {(void*)path, what.path_bytes},
                           {(void*)other, what.other_bytes},
                           {(void*)data, what.data_bytes}};
  size_t whole = 0;
  for (int part = 0; part < 4; ++part) whole += parts[part].iov_len;
  if (syscall(SYS_writev, log_to, parts, 4) != (long)whole) abort();
}

// What is to happen at the call that comes now: 0, or the fault that was asked for.
static int fault(uint32_t kind) {
  if (!(fail_kinds & (1u << kind))) return 0;
  ++calls;
  if (!fail_how || calls < fail_at || (calls > fail_at && !fail_after)) return 0;
  const int how = calls > fail_at && (fail_how == SHORTEN) ? FAIL : fail_how;
  if (how == EXIT || (how == TEAR && kind != WRITE)) _exit(9);
  if (how == FAIL || (how == SHORTEN && kind != WRITE)) {
    errno = fail_code;
    return FAIL;
  }
  return how;
}

static int is_file(int descriptor) {
  return descriptor >= 0 && descriptor < DESCRIPTORS && file_of[descriptor];
}

// The doors for the process itself.

__attribute__((visibility("default"))) void io_watch(const char* folder) {
  root_bytes = (size_t)snprintf(root, sizeof root, "%s", folder);
  calls = 0;
  fail_how = 0;
  fail_kinds = ~0u;
}

__attribute__((visibility("default"))) int io_log(const char* path) {
  if (log_to >= 0) syscall(SYS_close, log_to);
  log_to = -1;
  if (!path) return 0;
  const int opened = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (opened < 0) return -1;
  log_to = fcntl(opened, F_DUPFD_CLOEXEC, 512);
  syscall(SYS_close, opened);
  return log_to < 0 ? -1 : 0;
}

// From now the `at`-th call of the given kinds (counted from 1) fails, and the later ones where
// `after`; how: FAIL with errno `code`, SHORTEN a write (else FAIL), EXIT, TEAR a write and exit.
__attribute__((visibility("default"))) void io_fail(int how, int64_t at, int code, int after,
                                                    uint32_t kinds) {
  calls = 0;
  fail_how = how, fail_at = at, fail_code = code, fail_after = after, fail_kinds = kinds;
}

__attribute__((visibility("default"))) int64_t io_calls(void) { return calls; }

__attribute__((visibility("default"))) void io_mark(int64_t number) {
  pthread_mutex_lock(&turn);
  record((Record){.kind = MARK, .offset = number}, NULL, NULL, NULL);
  pthread_mutex_unlock(&turn);
}

// Opening and closing.

typedef int (*Opening)(int folder, const char* path, int flags, mode_t mode);

static int opened_at(int folder, const char* given, int flags, mode_t mode, Opening real) {
  char room[PATH_MAX];
  const char* path = absolute(folder, given, room);
  if (!watched(path)) return real(folder, given, flags, mode);
  pthread_mutex_lock(&turn);
  struct stat there;
  const int is_new = (flags & O_CREAT) && lstat(path, &there) != 0;
  const int changes = is_new || (flags & O_TRUNC);
  int descriptor = -1;
  if (!fault(changes ? OPEN : LOOK)) {
    descriptor = real(folder, given, flags, mode);
    if (descriptor >= DESCRIPTORS) abort();
    if (descriptor >= 0) {
      file_of[descriptor] = ++files;
      const uint32_t told = (is_new ? 1u : 0u) | (flags & O_TRUNC ? 2u : 0u);
      const int64_t node = fstat(descriptor, &there) ? 0 : (int64_t)there.st_ino;
      record((Record){.kind = OPEN, .file = files, .offset = node, .flags = told}, path, NULL,
             NULL);
    }
  }
  pthread_mutex_unlock(&turn);
  return descriptor;
}

static int real_openat(int folder, const char* path, int flags, mode_t mode) {
  return (int)syscall(SYS_openat, folder, path, flags, mode);
}

#define WITH_MODE(flags)                            \
  mode_t mode = 0;                                  \
  if ((flags) & (O_CREAT | __O_TMPFILE)) {          \
    va_list more;                                   \
    va_start(more, flags);                          \
    mode = (mode_t)va_arg(more, int);               \
    va_end(more);                                   \
  }

int open(const char* path, int flags, ...) {
  WITH_MODE(flags)
  return opened_at(AT_FDCWD, path, flags, mode, real_openat);
}
int open64(const char* path, int flags, ...) {
  WITH_MODE(flags)
  return opened_at(AT_FDCWD, path, flags | O_LARGEFILE, mode, real_openat);
}
int openat(int folder, const char* path, int flags, ...) {
  WITH_MODE(flags)
  return opened_at(folder, path, flags, mode, real_openat);
}
int openat64(int folder, const char* path, int flags, ...) {
  WITH_MODE(flags)
  return opened_at(folder, path, flags | O_LARGEFILE, mode, real_openat);
}
int creat(const char* path, mode_t mode) {
  return opened_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode, real_openat);
}
int creat64(const char* path, mode_t mode) { return creat(path, mode); }

int close(int descriptor) {
  NEXT(close);
  if (is_file(descriptor)) {
    pthread_mutex_lock(&turn);
    file_of[descriptor] = 0;
    pthread_mutex_unlock(&turn);
  }
  return real(descriptor);
}

// Writing. One buffer at a time: where several are given, they are joined.

static ssize_t written(int descriptor, const void* data, size_t bytes, int64_t offset) {
  pthread_mutex_lock(&turn);
  const int how = fault(WRITE);
  ssize_t done = -1;
  if (how != FAIL) {
    const size_t wanted = how == SHORTEN || how == TEAR ? bytes / 2 : bytes;
    done = offset < 0 ? syscall(SYS_write, descriptor, data, wanted)
                      : syscall(SYS_pwrite64, descriptor, data, wanted, offset);
    if (done > 0) {
      const int64_t at = offset < 0 ? lseek(descriptor, 0, SEEK_CUR) - done : offset;
      record((Record){.kind = WRITE,
                      .file = file_of[descriptor],
                      .offset = at,
                      .data_bytes = (uint32_t)done},
             NULL, NULL, data);
    }
    if (how == TEAR) _exit(9);
    // Half of one byte is none, and no kernel answers that nothing was written.
    if (how == SHORTEN && done == 0) {
      errno = fail_code;
      done = -1;
    }
  }
  pthread_mutex_unlock(&turn);
  return done;
}

static ssize_t written_parts(int descriptor, const struct iovec* parts, int count, int64_t offset) {
  size_t whole = 0;
  for (int part = 0; part < count; ++part) whole += parts[part].iov_len;
  char* joined = malloc(whole ? whole : 1);
  if (!joined) abort();
  size_t at = 0;
  for (int part = 0; part < count; ++part) {
    memcpy(joined + at, parts[part].iov_base, parts[part].iov_len);
    at += parts[part].iov_len;
  }
  const ssize_t done = written(descriptor, joined, whole, offset);
  free(joined);
  return done;
}

ssize_t write(int descriptor, const void* data, size_t bytes) {
  NEXT(write);
  return is_file(descriptor) ? written(descriptor, data, bytes, -1)
                             : real(descriptor, data, bytes);
}
ssize_t pwrite(int descriptor, const void* data, size_t bytes, off_t offset) {
  NEXT(pwrite);
  return is_file(descriptor) ? written(descriptor, data, bytes, offset)
                             : real(descriptor, data, bytes, offset);
}
ssize_t pwrite64(int descriptor, const void* data, size_t bytes, off64_t offset) {
  return pwrite(descriptor, data, bytes, offset);
}
ssize_t writev(int descriptor, const struct iovec* parts, int count) {
  NEXT(writev);
  return is_file(descriptor) ? written_parts(descriptor, parts, count, -1)
                             : real(descriptor, parts, count);
}
ssize_t pwritev(int descriptor, const struct iovec* parts, int count, off_t offset) {
  NEXT(pwritev);
  return is_file(descriptor) ? written_parts(descriptor, parts, count, offset)
                             : real(descriptor, parts, count, offset);
}
ssize_t pwritev64(int descriptor, const struct iovec* parts, int count, off64_t offset) {
  return pwritev(descriptor, parts, count, offset);
}

// A copy within the kernel would pass unseen: what asks for one is told to copy by itself.
ssize_t copy_file_range(int in, off64_t* in_at, int out, off64_t* out_at, size_t bytes,
                        unsigned flags) {
  NEXT(copy_file_range);
  if (!is_file(out)) return real(in, in_at, out, out_at, bytes, flags);
  errno = EXDEV;
  return -1;
}

int ftruncate(int descriptor, off_t bytes) {
  NEXT(ftruncate);
  if (!is_file(descriptor)) return real(descriptor, bytes);
  pthread_mutex_lock(&turn);
  int done = -1;
  if (!fault(TRUNCATE)) {
    done = real(descriptor, bytes);
    if (!done) {
      record((Record){.kind = TRUNCATE, .file = file_of[descriptor], .offset = bytes}, NULL, NULL,
             NULL);
    }
  }
  pthread_mutex_unlock(&turn);
  return done;
}
int ftruncate64(int descriptor, off64_t bytes) { return ftruncate(descriptor, bytes); }

static int synchronised(int descriptor, int (*real)(int)) {
  if (!is_file(descriptor)) return real(descriptor);
  pthread_mutex_lock(&turn);
  int done = -1;
  const int failed = fault(SYNC);
  if (!failed) done = real(descriptor);
  const uint32_t kind = failed ? SYNC_REFUSED : SYNC;
  record((Record){.kind = kind, .file = file_of[descriptor]}, NULL, NULL, NULL);
  pthread_mutex_unlock(&turn);
  return done;
}
int fsync(int descriptor) {
  NEXT(fsync);
  return synchronised(descriptor, real);
}
int fdatasync(int descriptor) {
  NEXT(fdatasync);
  return synchronised(descriptor, real);
}

// Names.

int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
  NEXT(renameat2);
  char from_room[PATH_MAX], to_room[PATH_MAX];
  const char* old = absolute(from_folder, from, from_room);
  const char* new = absolute(to_folder, to, to_room);
  if (!watched(old) && !watched(new)) return real(from_folder, from, to_folder, to, flags);
  pthread_mutex_lock(&turn);
  int done = -1;
  if (!fault(RENAME)) {
    done = real(from_folder, from, to_folder, to, flags);
    if (!done) record((Record){.kind = RENAME}, old, new, NULL);
  }
  pthread_mutex_unlock(&turn);
  return done;
}
int renameat(int from_folder, const char* from, int to_folder, const char* to) {
  return renameat2(from_folder, from, to_folder, to, 0);
}
int rename(const char* from, const char* to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int folder, const char* given, int flags) {
  NEXT(unlinkat);
  char room[PATH_MAX];
  const char* path = absolute(folder, given, room);
  if (!watched(path)) return real(folder, given, flags);
  pthread_mutex_lock(&turn);
  int done = -1;
  if (!fault(UNLINK)) {
    done = real(folder, given, flags);
    if (!done) record((Record){.kind = UNLINK}, path, NULL, NULL);
  }
  pthread_mutex_unlock(&turn);
  return done;
}
int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char* given, mode_t mode) {
  NEXT(mkdirat);
  char room[PATH_MAX];
  const char* path = absolute(folder, given, room);
  if (!watched(path)) return real(folder, given, mode);
  pthread_mutex_lock(&turn);
  int done = -1;
  if (!fault(MAKE)) {
    done = real(folder, given, mode);
    if (!done) record((Record){.kind = MAKE}, path, NULL, NULL);
  }
  pthread_mutex_unlock(&turn);
  return done;
}
int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
