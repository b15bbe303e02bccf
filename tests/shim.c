/* Counts the calls that change what is below a directory, writes them down, and ends the process at the n-th.

   Preloaded into a process (LD_PRELOAD), so that calls from threads of C++ are seen, too. Set by its environment:

     SHIM_ROOT   the directory, as an absolute path without links
     SHIM_LOG    a file to which each call is added when it has returned
     SHIM_KILL   n: SIGKILL before the n-th call does anything; 0 or none: never

   One call at a time: a lock is held from the count to the log, so that the log has the order in which they happened.
   A line of the log is: kind, result, offset or length, flags, bytes that follow, path, second path, with tabs between. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *root;
static size_t root_length;
static long count, kill_at;
static int log_file = -1;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("SHIM_LOG"), *n = getenv("SHIM_KILL");
  root = getenv("SHIM_ROOT");
  root_length = root ? strlen(root) : 0;
  kill_at = n ? atol(n) : 0;
  if (path) log_file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

#define REAL(name) ((__typeof__(&name))next(#name))
static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static int below(const char *path) {
  return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* Paths as they are when the call is made. */
static void of_number(int number, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", number);
  ssize_t length = readlink(link, out, PATH_MAX - 1);
  out[length < 0 ? 0 : length] = 0;
}

static void of_path(int folder, const char *path, char *out) {
  char home[PATH_MAX] = "";
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  if (folder != AT_FDCWD) of_number(folder, home);
  else if (!getcwd(home, sizeof home)) home[0] = 0;
  if (strlen(home) + strlen(path) + 2 > PATH_MAX) home[0] = 0;
  strcpy(out, home);
  strcat(out, "/");
  strncat(out, path, PATH_MAX - 1 - strlen(out));
}

/* Whether a call counts; then the lock is held. */
static int enter(const char *path) {
  if (!below(path)) return 0;
  pthread_mutex_lock(&lock);
  if (++count == kill_at) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
  }
  return 1;
}

static void leave(const char *kind, long result, long at, int flags, const char *path, const char *other,
                  const struct iovec *data, int parts) {
  int before = errno;
  char line[2 * PATH_MAX + 200];
  long rest = data && result > 0 ? result : 0;
  int length = snprintf(line, sizeof line, "%s\t%ld\t%ld\t%d\t%ld\t%s\t%s\n", kind, result, at, flags, rest, path, other);
  if (log_file >= 0) {
    (void)!syscall(SYS_write, log_file, line, (size_t)length);
    for (int part = 0; part < parts && rest > 0; part++) {
      long some = (long)data[part].iov_len < rest ? (long)data[part].iov_len : rest;
      (void)!syscall(SYS_write, log_file, data[part].iov_base, (size_t)some);
      rest -= some;
    }
  }
  pthread_mutex_unlock(&lock);
  errno = before;
}

/* Calls of paths: `call` is the real one. */
#define OF_PATHS(kind, folder, path, folder2, path2, flags, at, call)             \
  do {                                                                            \
    char one[PATH_MAX], two[PATH_MAX];                                            \
    of_path(folder, path, one);                                                   \
    of_path(folder2, path2, two);                                                 \
    int counts = enter(one);                                                      \
    __auto_type result = call;                                                    \
    if (counts) leave(kind, (long)result, at, flags, one, two, NULL, 0);          \
    return result;                                                                \
  } while (0)
#define OF_PATH(kind, folder, path, flags, at, call) OF_PATHS(kind, folder, path, AT_FDCWD, "/", flags, at, call)

/* Opening counts where it makes or empties a file. */
#define OPENED(name, folder, path, flags, ...)                                      \
  do {                                                                              \
    mode_t mode = 0;                                                                \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                          \
      va_list more;                                                                 \
      va_start(more, flags);                                                        \
      mode = va_arg(more, int);                                                     \
      va_end(more);                                                                 \
    }                                                                               \
    if (!(flags & (O_CREAT | O_TRUNC))) return REAL(name)(__VA_ARGS__, mode);       \
    OF_PATH("open", folder, path, flags, 0, REAL(name)(__VA_ARGS__, mode));         \
  } while (0)

int open(const char *path, int flags, ...) { OPENED(open, AT_FDCWD, path, flags, path, flags); }
int open64(const char *path, int flags, ...) { OPENED(open64, AT_FDCWD, path, flags, path, flags); }
int openat(int folder, const char *path, int flags, ...) { OPENED(openat, folder, path, flags, folder, path, flags); }
int openat64(int folder, const char *path, int flags, ...) {
  OPENED(openat64, folder, path, flags, folder, path, flags);
}

static int flags_of(const char *mode) { return *mode == 'w' ? O_CREAT | O_TRUNC : *mode == 'a' ? O_CREAT : 0; }
#define STREAM(name, path, mode)                                                           \
  do {                                                                                     \
    if (!flags_of(mode)) return REAL(name)(path, mode);                                    \
    char whole[PATH_MAX];                                                                  \
    of_path(AT_FDCWD, path, whole);                                                        \
    int counts = enter(whole);                                                             \
    FILE *file = REAL(name)(path, mode);                                                   \
    if (counts) leave("open", file ? 0 : -1, 0, flags_of(mode), whole, "", NULL, 0);       \
    return file;                                                                           \
  } while (0)
FILE *fopen(const char *path, const char *mode) { STREAM(fopen, path, mode); }
FILE *fopen64(const char *path, const char *mode) { STREAM(fopen64, path, mode); }

int creat(const char *path, mode_t mode) {
  OF_PATH("open", AT_FDCWD, path, O_CREAT | O_TRUNC, 0, REAL(creat)(path, mode));
}
int rename(const char *from, const char *to) {
  OF_PATHS("rename", AT_FDCWD, from, AT_FDCWD, to, 0, 0, REAL(rename)(from, to));
}
int renameat(int a, const char *from, int b, const char *to) {
  OF_PATHS("rename", a, from, b, to, 0, 0, REAL(renameat)(a, from, b, to));
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  OF_PATHS("rename", a, from, b, to, (int)flags, 0, REAL(renameat2)(a, from, b, to, flags));
}
int link(const char *from, const char *to) {
  OF_PATHS("link", AT_FDCWD, from, AT_FDCWD, to, 0, 0, REAL(link)(from, to));
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
  OF_PATHS("link", a, from, b, to, flags, 0, REAL(linkat)(a, from, b, to, flags));
}
int symlink(const char *to, const char *path) { OF_PATH("symlink", AT_FDCWD, path, 0, 0, REAL(symlink)(to, path)); }
int symlinkat(const char *to, int folder, const char *path) {
  OF_PATH("symlink", folder, path, 0, 0, REAL(symlinkat)(to, folder, path));
}
int mkdir(const char *path, mode_t mode) { OF_PATH("mkdir", AT_FDCWD, path, 0, 0, REAL(mkdir)(path, mode)); }
int mkdirat(int folder, const char *path, mode_t mode) {
  OF_PATH("mkdir", folder, path, 0, 0, REAL(mkdirat)(folder, path, mode));
}
int rmdir(const char *path) { OF_PATH("unlink", AT_FDCWD, path, 0, 0, REAL(rmdir)(path)); }
int unlink(const char *path) { OF_PATH("unlink", AT_FDCWD, path, 0, 0, REAL(unlink)(path)); }
int remove(const char *path) { OF_PATH("unlink", AT_FDCWD, path, 0, 0, REAL(remove)(path)); }
int unlinkat(int folder, const char *path, int flags) {
  OF_PATH("unlink", folder, path, 0, 0, REAL(unlinkat)(folder, path, flags));
}
int truncate(const char *path, off_t length) {
  OF_PATH("truncate", AT_FDCWD, path, 0, length, REAL(truncate)(path, length));
}
int truncate64(const char *path, off64_t length) {
  OF_PATH("truncate", AT_FDCWD, path, 0, length, REAL(truncate64)(path, length));
}

/* Calls of an open file. */
static long place(int number) {
  struct stat found;
  if ((fcntl(number, F_GETFL) & O_APPEND) && !fstat(number, &found)) return found.st_size;
  return lseek(number, 0, SEEK_CUR);
}

#define OF_FILE(kind, number, at, data, parts, call)                             \
  do {                                                                           \
    char path[PATH_MAX];                                                         \
    of_number(number, path);                                                     \
    int counts = enter(path);                                                    \
    long where = counts ? at : 0;                                                \
    __auto_type result = call;                                                   \
    if (counts) leave(kind, (long)result, where, 0, path, "", data, parts);      \
    return result;                                                               \
  } while (0)
#define ONE(data, length) (struct iovec[]){{(void *)data, length}}

ssize_t write(int number, const void *data, size_t length) {
  OF_FILE("write", number, place(number), ONE(data, length), 1, REAL(write)(number, data, length));
}
ssize_t writev(int number, const struct iovec *data, int parts) {
  OF_FILE("write", number, place(number), data, parts, REAL(writev)(number, data, parts));
}
ssize_t pwrite(int number, const void *data, size_t length, off_t at) {
  OF_FILE("write", number, at, ONE(data, length), 1, REAL(pwrite)(number, data, length, at));
}
ssize_t pwrite64(int number, const void *data, size_t length, off64_t at) {
  OF_FILE("write", number, at, ONE(data, length), 1, REAL(pwrite64)(number, data, length, at));
}
ssize_t pwritev(int number, const struct iovec *data, int parts, off_t at) {
  OF_FILE("write", number, at, data, parts, REAL(pwritev)(number, data, parts, at));
}
ssize_t pwritev64(int number, const struct iovec *data, int parts, off64_t at) {
  OF_FILE("write", number, at, data, parts, REAL(pwritev64)(number, data, parts, at));
}
int ftruncate(int number, off_t length) { OF_FILE("truncate", number, length, NULL, 0, REAL(ftruncate)(number, length)); }
int ftruncate64(int number, off64_t length) {
  OF_FILE("truncate", number, length, NULL, 0, REAL(ftruncate64)(number, length));
}
int fsync(int number) { OF_FILE("sync", number, 0, NULL, 0, REAL(fsync)(number)); }
int fdatasync(int number) { OF_FILE("sync", number, 0, NULL, 0, REAL(fdatasync)(number)); }
