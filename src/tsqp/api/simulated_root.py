"""The root of the simulated platform: for tests and trials only, because it proves nothing."""

# SHA-256 of the ARK's certificate in DER, as scripts/simulated-platform prints it.
SIMULATED_ARK = "0b5ada8d61b59ca970254dfac2a34b5c06df9afa46481e0b7b86fc4bd48a309a"
